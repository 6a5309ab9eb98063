"""What is left of the gradients when all products with states are there, a thread per channel.

With the weights of pairs of tokens, and what tokens read of and write to the states at the ends of
their chunk, everything else is channel by channel. The chunk has one S at its start and one dS at
its end. For a block inside, an earlier block adds to S its keys e^(G_m - G) K with values U, a
later one adds to dS its queries and keys e^G Q and e^G K: products of 16 by 16 tokens, through the
decays of the blocks between.

The gradient of a gate is the sum of all that its decay is in, and nothing is subtracted: pairs of
the block before and after it, what it and later tokens of the block read of S, what earlier ones
write, and S . dS times the decay of the block.
"""

from functools import cache

from numba import cuda

from nbdelta.cuda._backward_call import (
    BLOCK,
    BLOCKS,
    CHUNK,
    FACTORS,
    KEPT,
    READS_K,
    READS_Q,
    WEIGHTS,
    WRITES,
    chunk_of,
)
from nbdelta.cuda._backward_tokens import make_dot, make_tokens
from nbdelta.cuda._call import HV, KEY, G, K, Q, array_at, at, key_head
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._memory import (
    ITEMSIZE,
    block_writer,
    column_reader,
    reader,
    real_of,
    writer,
)
from nbdelta.cuda._ptx import tile
from nbdelta.cuda._shared import (
    element,
    set_element,
    shared_reader,
    shared_writer,
)
from nbdelta.cuda._tile_functions import i32, int32, registers
from nbdelta.cuda._tiles import make_zeros

SQUARE = CHUNK * CHUNK


@cache
def _make_channel(REAL):
    """What the tokens of a block, of a channel, do to each other and to the state."""
    row = registers(BLOCK, REAL)

    @tile(row, row, row, REAL, row, REAL)
    def add_two(e, acc, a, x, b, y):
        return [e.fma(p, x, e.fma(q, y, z)) for p, q, z in zip(a, b, acc)]

    @tile(registers(2 * BLOCK, REAL), row, row, row, row)
    def read_state(e, x, d, reads, total):
        """The gradient of q or k by what a block reads of the state; add its products with x."""
        out, before = [], e.real(REAL, 1.0)
        for i in range(BLOCK):
            before = e.mul(before, d[i])
            out.append(e.mul(before, reads[i]))
            total[i] = e.fma(out[i], x[i], total[i])
        return out + total

    @tile(registers(2 * BLOCK, REAL), *[row] * 5, REAL)
    def write_state(e, k, d, dk, reads, writes, kept):
        """What they write to it: dk and dg. `kept`: what passes through all gates of the block."""
        dg, written = [None] * BLOCK, [None] * BLOCK
        after, total = e.real(REAL, 1.0), e.real(REAL, 0.0)
        for i in reversed(range(BLOCK)):
            x = e.mul(after, writes[i])
            after = e.mul(after, d[i])
            written[i] = e.mul(x, k[i])
            dk[i] = e.add(dk[i], x)
            total = e.add(total, reads[i])
            dg[i] = total
        for i in range(BLOCK):
            dg[i] = e.add(dg[i], kept)
            kept = e.add(kept, written[i])
        return dk + dg

    @tile(registers(2 * BLOCK, REAL), registers(2 * BLOCK, REAL), row, row, row, REAL, i32)
    def read_token(e, acc, d, wp, wa, key, j):
        """Add what a block's tokens read of its token j to their dq and dk.

        `wp`, `wa`: column j of the weights, zeros where there is none.
        """
        dq, dk, run = acc[:BLOCK], acc[BLOCK:], key
        for i in range(BLOCK):
            run = e.select(e.less(j, e.u32(i)), e.mul(run, d[i]), key)
            dq[i] = e.fma(wp[i], run, dq[i])
            dk[i] = e.fma(wa[i], run, dk[i])
        return dq + dk

    @tile(registers(BLOCK + 1, REAL), row, row, row, row, row, row, REAL, i32)
    def read_by_tokens(e, dg, q, k, d, wp, wa, key, j):
        """The way back: dg, and what is added to dk of token j."""
        back, run, own = [None] * BLOCK, key, e.real(REAL, 0.0)
        for i in reversed(range(BLOCK)):
            x = e.fma(wp[i], q[i], e.mul(wa[i], k[i]))
            back[i] = x if i == BLOCK - 1 else e.fma(back[i + 1], d[i + 1], x)
            own = e.select(e.less(e.u32(i), j), own, back[i])
        for i in range(1, BLOCK):
            later = e.less(j, e.u32(i))
            run = e.select(later, e.mul(run, d[i]), key)
            dg[i] = e.select(later, e.fma(run, back[i], dg[i]), dg[i])
        return [*dg, own]

    return add_two, read_state, write_state, read_token, read_by_tokens


def channels_bytes(dtype, KP):
    """Bytes of dynamic shared memory."""
    numbers = 2 * SQUARE + 3 * CHUNK + (2 * BLOCK + 2 * BLOCKS) * KP
    return numbers * (8 if dtype == "float64" else 4)


@specialised
def channels_kernel(dtype, gate, KP):
    """The kernel, for a grid of chunks x value heads.

    The reads become the gradients of q and k, the writes that of the log decay. `gate`: per "head",
    per "channel", or None.
    """
    REAL = real_of(dtype)
    get_column, get_rows = (column_reader(x, REAL, BLOCK) for x in (dtype, str(REAL)))
    put_rows = block_writer(REAL, 1, BLOCK)
    get, put = reader(str(REAL), REAL), writer(str(REAL), REAL)
    size = ITEMSIZE[str(REAL)]
    prefixes, suffixes, products, scale, ones, ones_after = make_tokens(REAL)
    add_two, read_state, write_state, read_token, read_by_tokens = _make_channel(REAL)
    dot = make_dot(REAL, BLOCK)
    # weights with what comes after; of a channel, tokens are KP apart
    ERASE, NORMS = SQUARE, 2 * SQUARE
    GATES = NORMS + 2 * CHUNK
    QUERIES = GATES + CHUNK
    KEYS = QUERIES + BLOCK * KP
    DECAYS = KEYS + BLOCK * KP
    ALL_KEPT = DECAYS + BLOCKS * KP
    row_of_weights = shared_reader(REAL, tuple(range(0, BLOCK, 4)), 4)
    column_of_weights = shared_reader(REAL, tuple(range(0, BLOCK * CHUNK, CHUNK)))
    put_own = shared_writer(REAL, tuple(range(0, BLOCK * KP, KP)))
    zeros, one = make_zeros(BLOCK, REAL), REAL(1)

    @device
    def load_queries(desc, s, b, start, block, count, hv, c):
        q, first = array_at(desc, Q), start + BLOCK * block
        source = at(q, b, first, key_head(desc, hv)) + c * q[5]
        x = get_column(source, q[3], count - BLOCK * block)
        return products(x, row_of_weights(s, NORMS + BLOCK * block))

    @device
    def load_keys(desc, s, b, start, block, count, hv, c):
        k, first = array_at(desc, KEY), start + BLOCK * block
        source = at(k, b, first, key_head(desc, hv)) + c * k[5]
        x = get_column(source, k[3], count - BLOCK * block)
        return products(x, row_of_weights(s, NORMS + CHUNK + BLOCK * block))

    @device
    def load_decays(desc, s, b, start, block, count, hv, c):
        left = count - BLOCK * block
        if gate == "head":
            return ones_after(row_of_weights(s, GATES + BLOCK * block), int32(left))
        if gate is None:
            return ones()
        g = array_at(desc, G)
        source = at(g, b, start + BLOCK * block, hv) + c * g[5]
        return ones_after(get_rows(source, g[3], left), int32(left))

    @kernel(KP)
    def backward_channels_kernel(desc):
        s = cuda.shared.array(0, REAL)
        c = cuda.threadIdx.x
        slot, hv = cuda.blockIdx.x // desc[HV], cuda.blockIdx.x % desc[HV]
        _, b, start, count, _ = chunk_of(desc, slot)
        if count <= 0:
            return
        weights, factors = at(array_at(desc, WEIGHTS), slot, hv, 0), array_at(desc, FACTORS)
        for i in range(c, 2 * SQUARE, KP):
            set_element(s, i, get(weights + i * size))
        for i in range(c, 2 * CHUNK, KP):
            t = i % CHUNK
            x = get(at(factors, b, start + min(t, count - 1), hv) + i // CHUNK * size)
            set_element(s, NORMS + i, x)
        if gate == "head" and c < CHUNK:
            x = get(at(array_at(desc, G), b, start + min(c, count - 1), hv))
            set_element(s, GATES + c, x)
        cuda.syncthreads()
        if c >= desc[K]:
            return
        reads_q, reads_k = array_at(desc, READS_Q), array_at(desc, READS_K)
        writes = array_at(desc, WRITES)
        own, step = c * size, writes[3]
        blocks = (count + BLOCK - 1) // BLOCK
        for m in range(blocks):
            d = load_decays(desc, s, b, start, m, count, hv, c)
            set_element(s, DECAYS + m * KP + c, prefixes(d)[BLOCK - 1])

        # S at the start of the chunk, and dS as it was at the end of a block
        kept = get(at(array_at(desc, KEPT), slot, hv, 0) + own)
        for m in range(blocks - 1, -1, -1):
            before, first, n = one, start + BLOCK * m, count - BLOCK * m
            for l in range(m):
                before *= element(s, DECAYS + l * KP + c)
            decay = element(s, DECAYS + m * KP + c)
            kept *= decay
            set_element(s, ALL_KEPT + m * KP + c, before * kept)
            d = prefixes(load_decays(desc, s, b, start, m, count, hv, c))
            at_x = at(reads_q, b, first, hv) + own
            x, y = get_rows(at_x, step, n), load_queries(desc, s, b, start, m, count, hv, c)
            kept += dot(products(y, d), x)
            put_rows(at_x, 0, step, 1, n, scale(x, before))
            at_x = at(reads_k, b, first, hv) + own
            x, y = get_rows(at_x, step, n), load_keys(desc, s, b, start, m, count, hv, c)
            kept += dot(products(y, d), x)
            put_rows(at_x, 0, step, 1, n, scale(x, before))

        # what block m writes, and later blocks n read
        for m in range(blocks - 1):
            keys = suffixes(load_decays(desc, s, b, start, m, count, hv, c))
            keys = products(keys, load_keys(desc, s, b, start, m, count, hv, c))
            at_m = at(writes, b, start + BLOCK * m, hv) + own
            write = get_rows(at_m, step, BLOCK)
            for n in range(blocks - 1, m, -1):
                between = one
                for l in range(m + 1, n):
                    between *= element(s, DECAYS + l * KP + c)
                decay, place = element(s, DECAYS + n * KP + c), ALL_KEPT + n * KP + c
                x = decay * between * dot(keys, write)
                set_element(s, place, element(s, place) + x)
                d = prefixes(load_decays(desc, s, b, start, n, count, hv, c))
                q = load_queries(desc, s, b, start, n, count, hv, c)
                put_own(s, QUERIES + c, products(q, d))
                k = load_keys(desc, s, b, start, n, count, hv, c)
                put_own(s, KEYS + c, products(k, d))
                write = scale(write, decay)
                first = start + BLOCK * n
                at_q, at_k = at(reads_q, b, first, hv) + own, at(reads_k, b, first, hv) + own
                for i in range(min(BLOCK, count - BLOCK * n)):
                    weight = (BLOCK * n + i) * CHUNK + BLOCK * m
                    wp, wa = row_of_weights(s, weight), row_of_weights(s, ERASE + weight)
                    put(at_q, get(at_q) + between * dot(wp, keys))
                    put(at_k, get(at_k) + between * dot(wa, keys))
                    x, y = element(s, QUERIES + i * KP + c), element(s, KEYS + i * KP + c)
                    write = add_two(write, wp, x, wa, y)
                    at_q, at_k = at_q + step, at_k + step
            put_rows(at_m, 0, step, 1, BLOCK, write)

        # the tokens of a block: one thing after the other, as there are so many registers
        for m in range(blocks):
            first, n = start + BLOCK * m, count - BLOCK * m
            weight, tokens = BLOCK * m * CHUNK + BLOCK * m, min(BLOCK, n)
            at_q, at_k = at(reads_q, b, first, hv) + own, at(reads_k, b, first, hv) + own
            at_m = at(writes, b, first, hv) + own
            d = load_decays(desc, s, b, start, m, count, hv, c)
            q = load_queries(desc, s, b, start, m, count, hv, c)
            x = read_state(q, d, get_rows(at_q, step, n), zeros())
            put_rows(at_q, 0, step, 1, n, x[:16])
            k = load_keys(desc, s, b, start, m, count, hv, c)
            put_own(s, KEYS + c, k)
            x = read_state(k, d, get_rows(at_k, step, n), x[16:])
            kept = element(s, ALL_KEPT + m * KP + c)
            x = write_state(k, d, x[:16], x[16:], get_rows(at_m, step, n), kept)
            put_rows(at_m, 0, step, 1, n, x[16:])
            acc = get_rows(at_q, step, n) + x[:16]
            for j in range(tokens):
                wp = column_of_weights(s, weight + j)
                wa = column_of_weights(s, ERASE + weight + j)
                acc = read_token(acc, d, wp, wa, element(s, KEYS + j * KP + c), int32(j))
            put_rows(at_q, 0, step, 1, n, acc[:16])
            put_rows(at_k, 0, step, 1, n, acc[16:])
            q = load_queries(desc, s, b, start, m, count, hv, c)
            k = load_keys(desc, s, b, start, m, count, hv, c)
            dg = get_rows(at_m, step, n)
            for j in range(tokens):
                wp = column_of_weights(s, weight + j)
                wa = column_of_weights(s, ERASE + weight + j)
                x = read_by_tokens(dg, q, k, d, wp, wa, element(s, KEYS + j * KP + c), int32(j))
                dg = x[:16]
                put(at_k, get(at_k) + x[16])
                at_k += step
            put_rows(at_m, 0, step, 1, n, dg)

    return backward_channels_kernel

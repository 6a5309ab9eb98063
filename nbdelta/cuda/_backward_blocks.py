"""A block of 16 tokens and a state of which a block of threads has 32 columns.

A thread has two columns of the state and every 16th group of four channels. The products of tokens
with the state are summed over the threads, and a warp solves a triangular system, a column a lane.
"""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK, FACTORS, PAIRS
from nbdelta.cuda._call import KEY, SCALE, G, K, Q, V, array_at, at, key_head
from nbdelta.cuda._jit import device
from nbdelta.cuda._math import exp
from nbdelta.cuda._memory import (
    ITEMSIZE,
    read_real,
    reader,
    real_field,
    real_of,
    write_real,
)
from nbdelta.cuda._ptx import shuffle_xor, tile
from nbdelta.cuda._shared import (
    element,
    set_element,
    shared_reader,
    shared_writer,
)
from nbdelta.cuda._tile_functions import registers

THREADS, WARPS = 256, 8
COLUMNS = 32
TILE = BLOCK * COLUMNS
# numbers in shared memory: triangles, betas, sums of every warp, three tiles of 16 x 32, and, for
# K channels, the decay of a block and its tiles of K and Q (or a state on its way)
M, P, BETA, PARTS = 0, 256, 512, 528
X, U, RIGHT, TILES = (PARTS + WARPS * TILE + i * TILE for i in range(4))


def shared_bytes(dtype, KP, tiles):
    """Bytes of dynamic shared memory for so many tiles."""
    return (TILES + (1 + BLOCK * tiles) * KP) * (8 if dtype == "float64" else 4)


@cache
def _make_state(REAL, KP):
    """What is done to a thread's part of a state, two columns of KP / 16 channels."""
    n = KP // 16
    state, row, pair = (registers(x, REAL) for x in (2 * n, n, 2))
    # four channels of every 64
    places = tuple(COLUMNS * (64 * (c // 4) + c % 4) + 16 * j for c in range(n) for j in range(2))
    channels = shared_reader(REAL, tuple(range(0, KP, 64)), 4)

    @tile(pair, state, row)
    def dots(e, s, a):
        out = [e.mul(a[0], s[j]) for j in range(2)]
        for c in range(1, n):
            out = [e.fma(a[c], s[2 * c + j], out[j]) for j in range(2)]
        return out

    @tile(state, state, row, pair)
    def add_product(e, s, a, u):
        return [e.fma(a[i // 2], u[i % 2], s[i]) for i in range(2 * n)]

    @tile(state, state, row)
    def scale(e, s, a):
        return [e.mul(a[i // 2], s[i]) for i in range(2 * n)]

    return (
        shared_reader(REAL, places),
        shared_writer(REAL, places),
        channels,
        dots,
        add_product,
        scale,
    )


@cache
def make_solve(REAL):
    """Substitution, a column a lane: the next unknown is always the first one."""
    row = registers(BLOCK, REAL)

    @tile(row, row, row, REAL)
    def substitute(e, x, m, u):
        # what comes in at the end never gets to the front
        return [e.fma(m[i], u, x[i + 1]) for i in range(BLOCK - 1)] + x[:1]

    get_row = shared_reader(REAL, tuple(range(0, BLOCK, 4)), 4)
    get_column = shared_reader(REAL, tuple(range(0, TILE, COLUMNS)))
    return substitute, get_row, get_column


@cache
def make_block(dtype, gate_dtype, KP):
    """Loading what both kernels want of a block of tokens."""
    REAL = real_of(dtype)
    get, get_gate = reader(dtype, REAL), reader(gate_dtype or dtype, REAL)
    get_real, real = reader(str(REAL), REAL), real_field(REAL)
    size = ITEMSIZE[str(REAL)]
    PRE, SUFFIX = TILES + KP, TILES + KP + BLOCK * KP
    zero, one = REAL(0), REAL(1)

    @device
    def load_channel(desc, x, norm, factor, r_x, r_d, b, first, n, hv, c):
        """Channel c of K or Q, normalised, and of the decays: of tokens past the end 0 and 1."""
        g, factors = array_at(desc, G), array_at(desc, FACTORS)
        # of what is not there something else is read, so that all reads are under way at once
        inside, own = c < desc[K], min(c, desc[K] - 1)
        source, gates = at(x, b, first, key_head(desc, hv)) + own * x[5], at(g, b, first, hv)
        norms = at(factors, b, first, hv) + norm * size
        for t in range(BLOCK):
            i = min(t, n - 1)
            number = factor * get(source + i * x[3]) * get_real(norms + i * factors[3])
            r_x[t] = number if inside and t < n else zero
            r_d[t] = one
            if gate_dtype is not None:
                decay = exp(get_gate(gates + own * g[5] + i * g[3]))
                r_d[t] = decay if t < n else one

    @device
    def load_keys(desc, s, r_k, r_d, b, first, n, hv, c):
        """Channel c of e^G K, of e^(G_n - G) K and of the decay of the block."""
        load_channel(desc, array_at(desc, KEY), 1, one, r_k, r_d, b, first, n, hv, c)
        decay = one
        for t in range(BLOCK):
            decay *= r_d[t]
            set_element(s, PRE + t * KP + c, decay * r_k[t])
        set_element(s, TILES + c, decay)
        decay = one
        for i in range(BLOCK):
            t = BLOCK - 1 - i
            set_element(s, SUFFIX + t * KP + c, decay * r_k[t])
            decay *= r_d[t]

    @device
    def load_queries(desc, s, r_q, r_d, b, first, n, hv, c):
        """Channel c of scale e^G Q."""
        scale = real(desc[SCALE])
        load_channel(desc, array_at(desc, Q), 0, scale, r_q, r_d, b, first, n, hv, c)
        decay = one
        for t in range(BLOCK):
            decay *= r_d[t]
            set_element(s, SUFFIX + (BLOCK + t) * KP + c, decay * r_q[t])

    @device
    def pair_weight(desc, which, b, first, n, hv, i, j):
        """Number (i, j) of M or P, 0 where there is none."""
        pairs = array_at(desc, PAIRS)
        x = get_real(at(pairs, b, first + min(i, n - 1), hv) + (which * BLOCK + max(j, 0)) * size)
        return x if j >= 0 and i < n else zero

    @device
    def beta_of(desc, b, first, n, hv, i):
        x = get_real(at(array_at(desc, FACTORS), b, first + min(i, n - 1), hv) + 2 * size)
        return x if i < n else zero

    return load_keys, load_queries, pair_weight, beta_of


@cache
def make_staging(REAL, KP, wide):
    """Bringing a state from memory of any layout to shared memory, and back."""
    get, put = read_real(REAL, wide), write_real(REAL, wide)
    zero = REAL(0)

    @device
    def bring(desc, s, x, n, hv, first, tid):
        column = first + (tid & 31)
        for c in range(tid >> 5, KP, WARPS):
            value = zero
            if x[0] != 0 and c < desc[K] and column < desc[V]:
                value = get(x[1], at(x, n, hv, c) + column * x[5])
            set_element(s, TILES + c * COLUMNS + (tid & 31), value)

    @device
    def take(desc, s, x, n, hv, first, tid):
        column = first + (tid & 31)
        if column < desc[V]:
            for c in range(tid >> 5, desc[K], WARPS):
                put(
                    x[1],
                    at(x, n, hv, c) + column * x[5],
                    element(s, TILES + c * COLUMNS + (tid & 31)),
                )

    return bring, take


@cache
def make_products(dtype, KP):
    """What a block of tokens and the state do to each other."""
    REAL = real_of(dtype)
    get_state, put_state, channels, dots, add_product, scale = _make_state(REAL, KP)

    @device
    def read_state(s, state, rows, group, lane, warp):
        """Leave the warp's part in the products of 16 rows with the state."""
        high = (lane & 16) != 0
        for i in range(BLOCK):
            x = dots(state, channels(s, rows + i * KP + group))
            # either half of a warp goes on with one of the two columns
            own = (x[1] if high else x[0]) + shuffle_xor(x[0] if high else x[1], 16)
            set_element(s, PARTS + (warp * BLOCK + i) * COLUMNS + lane, own)

    @device
    def sum_of_parts(s, i):
        total = element(s, PARTS + i)
        for w in range(1, WARPS):
            total += element(s, PARTS + w * TILE + i)
        return total

    @device
    def write_state(s, state, rows, group, values, lane):
        """Add the products of 16 rows with 16 rows of values to the state."""
        column = values + (lane & 15)
        for i in range(BLOCK):
            x = element(s, column + i * COLUMNS), element(s, column + i * COLUMNS + 16)
            state = add_product(state, channels(s, rows + i * KP + group), x)
        return state

    @device
    def pass_block(s, state, group):
        return scale(state, channels(s, TILES + group))

    return get_state, put_state, read_state, sum_of_parts, write_state, pass_block

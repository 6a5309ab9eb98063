"""The products of tokens in the backward pass, all chunks at once.

Of those of a block with each other, as the forward pass has them, and of those of a chunk:

    M_ij = e^(G_i - G_j) k_i.k_j (i > j)      P_ij = scale e^(G_i - G_j) q_i.k_j (i >= j)
    wp_ij = scale dO_i.U_j (i >= j)           wa_ij = -Y_i.U_j (i > j)
"""

from functools import cache

from numba import cuda

from nbdelta.cuda._backward_call import (
    BLOCK,
    BLOCKS,
    CHUNK,
    DBETA,
    DERRORS,
    DO,
    ERRORS,
    FACTORS,
    PAIRS,
    WEIGHTS,
    chunk_of,
)
from nbdelta.cuda._backward_tokens import make_dot
from nbdelta.cuda._call import (
    BETA,
    BETA_FACTOR,
    EPS,
    HV,
    KEY,
    L2NORM,
    SCALE,
    SIGMOID_BETA,
    G,
    K,
    Q,
    V,
    array_at,
    at,
    key_head,
)
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._math import gate_functions, sqrt
from nbdelta.cuda._memory import (
    ITEMSIZE,
    block_writer,
    column_reader,
    read_real,
    reader,
    real_field,
    real_of,
    write_real,
    writer,
)
from nbdelta.cuda._ptx import shuffle_xor, tile
from nbdelta.cuda._shared import element, set_element, shared_reader
from nbdelta.cuda._tile_functions import i32, int32, registers
from nbdelta.cuda._tiles import make_zeros

THREADS = 256
SQUARE = BLOCK * BLOCK
# rows of tokens in shared memory, with a gap against bank conflicts; columns of V at once
PITCH = CHUNK + 4
COLUMNS = 32


@cache
def _make_running(REAL, n):
    row = registers(n, REAL)

    @tile(row, row, row, row, i32, i32)
    def run_on(e, x, key, decay, i, j):
        """k_j until token j, then times the decay of token i."""
        later = e.less(j, i)
        return [e.select(later, e.mul(y, d), k) for y, k, d in zip(x, key, decay)]

    return run_on


@cache
def make_outer(REAL, m, n):
    """Add m x n products, row after row."""

    @tile(registers(m * n, REAL), registers(m * n, REAL), registers(m, REAL), registers(n, REAL))
    def outer(e, acc, a, b):
        return [e.fma(a[i // n], b[i % n], acc[i]) for i in range(m * n)]

    return outer, make_zeros(m * n, REAL)


@cache
def _make_weights(REAL):
    square, four = registers(16, REAL), registers(4, REAL)

    @tile(registers(32, REAL), square, square, four, four, REAL, i32, i32)
    def weights(e, p, a, of_rows, of_columns, scale, i, j):
        """4 x 4 numbers of wp and of wa, from token i and token j on."""
        zero = e.real(REAL, 0.0)
        written, erased = [], []
        for x, y, r, c in zip(p, a, range(16), list(range(4)) * 4):
            r = r // 4
            column, row = e.iadd(j, e.u32(c)), e.iadd(i, e.u32(r))
            x = e.mul(e.mul(x, of_columns[c]), scale)
            y = e.sub(zero, e.mul(e.mul(y, of_columns[c]), of_rows[r]))
            written.append(e.select(e.less(row, column), zero, x))
            erased.append(e.select(e.less(column, row), y, zero))
        return written + erased

    return weights


def pairs_bytes(dtype, KP):
    """Bytes of dynamic shared memory of `pairs_kernel`."""
    return (3 * BLOCK * KP + 2 * SQUARE + 2 * BLOCK) * (8 if dtype == "float64" else 4)


@specialised
def pairs_kernel(dtype, gate, KP, wide):
    """The kernel, for a grid of chunks x blocks x value heads; it makes the factors as well.

    `wide`: whether beta may be float64.
    """
    REAL = real_of(dtype)
    get, get_decay = reader(dtype, REAL), reader(str(REAL), REAL)
    put, real, read = writer(str(REAL), REAL), real_field(REAL), read_real(REAL, wide)
    size = ITEMSIZE[str(REAL)]
    sigmoid, _ = gate_functions(REAL)
    run_on, dot = _make_running(REAL, KP // 16), make_dot(REAL, KP // 16)
    channels = shared_reader(REAL, tuple(range(0, KP, 64)), 4)
    QUERIES, DECAYS = BLOCK * KP, 2 * BLOCK * KP
    OUT = 3 * BLOCK * KP
    NORMS = OUT + 2 * SQUARE
    zero, one = REAL(0), REAL(1)

    @device
    def sum16(x):
        """The sum over 16 lanes."""
        x += shuffle_xor(x, 8)
        x += shuffle_xor(x, 4)
        x += shuffle_xor(x, 2)
        return x + shuffle_xor(x, 1)

    @kernel(THREADS)
    def backward_pairs_kernel(desc):
        s = cuda.shared.array(0, REAL)
        tid = cuda.threadIdx.x
        rest, hv = cuda.blockIdx.x // desc[HV], cuda.blockIdx.x % desc[HV]
        slot, block = rest // BLOCKS, rest % BLOCKS
        _, b, first, count, _ = chunk_of(desc, slot)
        first += BLOCK * block
        n = min(BLOCK, count - BLOCK * block)
        if n <= 0:
            return
        hk = key_head(desc, hv)
        q, k, g = array_at(desc, Q), array_at(desc, KEY), array_at(desc, G)
        for i in range(BLOCK * KP // THREADS):
            place = tid + i * THREADS
            t, c = place // KP, place % KP
            inside, t, c = t < n and c < desc[K], min(t, n - 1), min(c, desc[K] - 1)
            x, y, d = (
                get(at(k, b, first + t, hk) + c * k[5]),
                get(at(q, b, first + t, hk) + c * q[5]),
                one,
            )
            if gate is not None:
                d = get_decay(at(g, b, first + t, hv) + c * g[5])
            set_element(s, place, x if inside else zero)
            set_element(s, QUERIES + place, y if inside else zero)
            set_element(s, DECAYS + place, d)
        cuda.syncthreads()

        # 16 threads have a row
        j, own = tid >> 4, 4 * (tid & 15)
        key, query = channels(s, j * KP + own), channels(s, QUERIES + j * KP + own)
        of_key, of_query = one, one
        if desc[L2NORM]:
            of_key = one / sqrt(sum16(dot(key, key)) + real(desc[EPS]))
            of_query = one / sqrt(sum16(dot(query, query)) + real(desc[EPS]))
        if own == 0:
            set_element(s, NORMS + j, of_key)
            set_element(s, NORMS + BLOCK + j, real(desc[SCALE]) * of_query)
            if j < n:
                strength, beta = one, array_at(desc, BETA)
                if beta[0] != 0:
                    strength = read(beta[1], at(beta, b, first + j, hv))
                if desc[SIGMOID_BETA]:
                    strength = real(desc[BETA_FACTOR]) * sigmoid(strength)
                target = at(array_at(desc, FACTORS), b, first + j, hv)
                put(target, of_query)
                put(target + size, of_key)
                put(target + 2 * size, strength)
        x = key
        for i in range(BLOCK):
            x = run_on(x, key, channels(s, DECAYS + i * KP + own), int32(i), int32(j))
            m = sum16(dot(x, channels(s, i * KP + own)))
            p = sum16(dot(x, channels(s, QUERIES + i * KP + own)))
            if own == 0:
                set_element(s, OUT + i * BLOCK + j, m if i > j else zero)
                set_element(s, OUT + SQUARE + i * BLOCK + j, p if i >= j else zero)
        cuda.syncthreads()
        i, j = tid >> 4, tid & 15
        if i < n:
            target = at(array_at(desc, PAIRS), b, first + i, hv) + j * size
            x = element(s, OUT + tid) * element(s, NORMS + j)
            put(target, x * element(s, NORMS + i))
            x = element(s, OUT + SQUARE + tid) * element(s, NORMS + j)
            put(target + BLOCK * size, x * element(s, NORMS + BLOCK + i))

    return backward_pairs_kernel


def weights_bytes(dtype):
    """Bytes of dynamic shared memory of `weights_kernel`."""
    return 3 * COLUMNS * PITCH * (8 if dtype == "float64" else 4)


@specialised
def weights_kernel(dtype, do_dtype, wide):
    """The kernel, for a grid of chunks x value heads; the gradient of beta is on the diagonal.

    `wide`: whether beta may be float64.
    """
    REAL = real_of(dtype)
    get, get_real = reader(do_dtype or dtype, REAL), reader(str(REAL), REAL)
    real = real_field(REAL)
    read, write = read_real(REAL, wide), write_real(REAL, wide)
    size = ITEMSIZE[str(REAL)]
    sigmoid, _ = gate_functions(REAL)
    outer, zeros = make_outer(REAL, 4, 4)
    finish = _make_weights(REAL)
    betas, put_square = column_reader(str(REAL), REAL, 4), block_writer(REAL, 4, 4)
    four = shared_reader(REAL, (0,), 4)
    E, DU, ROWS = 0, COLUMNS * PITCH, 2 * COLUMNS * PITCH
    zero = REAL(0)

    @kernel(THREADS)
    def backward_weights_kernel(desc):
        s = cuda.shared.array(0, REAL)
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        slot, hv = cuda.blockIdx.x // desc[HV], cuda.blockIdx.x % desc[HV]
        _, b, first, count, _ = chunk_of(desc, slot)
        if count <= 0:
            return
        errors, derrors, do = array_at(desc, ERRORS), array_at(desc, DERRORS), array_at(desc, DO)
        i, j = 4 * (tid >> 4), 4 * (tid & 15)
        p, a = zeros(), zeros()
        for left in range(0, desc[V], COLUMNS):
            column = min(left + lane, desc[V] - 1)
            for m in range(CHUNK // 8):
                t = warp + 8 * m
                inside, token = t < count and left + lane < desc[V], first + min(t, count - 1)
                x = get_real(at(errors, b, token, hv) + column * size)
                set_element(s, E + lane * PITCH + t, x if inside else zero)
                x = get_real(at(derrors, b, token, hv) + column * size)
                set_element(s, DU + lane * PITCH + t, x if inside else zero)
                x = zero
                if do_dtype is not None:
                    x = get(at(do, b, token, hv) + column * do[5])
                set_element(s, ROWS + lane * PITCH + t, x if inside else zero)
            cuda.syncthreads()
            if j <= i:
                for v in range(0, COLUMNS * PITCH, PITCH):
                    x = four(s, E + v + j)
                    p = outer(p, four(s, ROWS + v + i), x)
                    a = outer(a, four(s, DU + v + i), x)
            cuda.syncthreads()
        beta, dbeta, factors = array_at(desc, BETA), array_at(desc, DBETA), array_at(desc, FACTORS)
        target = at(array_at(desc, WEIGHTS), slot, hv, 0)
        at_rows = at(factors, b, first + min(i, count - 1), hv) + 2 * size
        at_columns = at(factors, b, first + min(j, count - 1), hv) + 2 * size
        of_rows = betas(at_rows, factors[3], count - i)
        of_columns = betas(at_columns, factors[3], count - j)
        if i == j and dbeta[0] != 0:
            diagonal = a[0], a[5], a[10], a[15]
            for m in range(min(4, count - i)):
                x, token = diagonal[m], first + i + m
                if desc[SIGMOID_BETA]:
                    y = read(beta[1], at(beta, b, token, hv))
                    x *= real(desc[BETA_FACTOR]) * sigmoid(y) * sigmoid(-y)
                write(dbeta[1], at(dbeta, b, token, hv), x)
        x = finish(p, a, of_rows, of_columns, real(desc[SCALE]), int32(i), int32(j))
        target = at(array_at(desc, WEIGHTS), slot, hv, 0) + (i * CHUNK + j) * size
        put_square(target, CHUNK * size, size, 4, 4, x[:16])
        put_square(target + CHUNK * CHUNK * size, CHUNK * size, size, 4, 4, x[16:])

    return backward_weights_kernel

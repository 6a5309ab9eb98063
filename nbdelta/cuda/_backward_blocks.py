"""A block of 16 tokens and a state of which a block of threads has 32 columns.

A thread has two columns of the state and every 16th group of four channels. The products of tokens
with the state are summed over the threads, and a warp solves a triangular system, a column a lane.
"""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK, FACTORS, PAIRS
from nbdelta.cuda._backward_tokens import exp_of, make_tokens
from nbdelta.cuda._call import KEY, SCALE, G, K, Q, V, array_at, at, key_head
from nbdelta.cuda._jit import device
from nbdelta.cuda._memory import (
    ITEMSIZE,
    column_reader,
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
from nbdelta.cuda._tile_functions import i32, registers

THREADS, WARPS = 256, 8
COLUMNS = 32
TILE = BLOCK * COLUMNS
# of tokens, at once
ROWS = 4
# numbers in shared memory: triangles, betas, sums of every warp, three tiles of 16 x 32, and, for
# K channels, the decay of a block and its tiles of K and Q (or a state on its way)
M, P, BETA, PARTS = 0, 256, 512, 528
X, U, RIGHT, TILES = (PARTS + WARPS * TILE + i * TILE for i in range(4))


def shared_bytes(dtype, KP, tiles):
    """Bytes of dynamic shared memory for so many tiles."""
    return (TILES + (1 + BLOCK * tiles) * KP) * (8 if dtype == "float64" else 4)


@cache
def _make_state(REAL, KP):
    """What is done to a thread's part of a state, two columns of KP / 16 channels.

    For some rows of tokens at once, so that one address serves all that is read for them.
    """
    n = KP // 16
    state, row, rows, pairs = (registers(x, REAL) for x in (2 * n, n, ROWS * n, 2 * ROWS))
    # four channels of every 64
    places = tuple(COLUMNS * (64 * (c // 4) + c % 4) + 16 * j for c in range(n) for j in range(2))
    channels, channels_of_rows = (
        shared_reader(REAL, tuple(KP * i + c for i in range(m) for c in range(0, KP, 64)), 4)
        for m in (1, ROWS)
    )
    values = shared_reader(REAL, tuple(COLUMNS * i + 16 * j for i in range(ROWS) for j in range(2)))

    @tile(pairs, state, rows)
    def dots(e, s, a):
        out = []
        for i in range(0, ROWS * n, n):
            own = [e.mul(a[i], s[j]) for j in range(2)]
            for c in range(1, n):
                own = [e.fma(a[i + c], s[2 * c + j], own[j]) for j in range(2)]
            out += own
        return out

    @tile(state, state, rows, pairs)
    def add_products(e, s, a, u):
        for i in range(ROWS):
            s = [e.fma(a[n * i + c // 2], u[2 * i + c % 2], s[c]) for c in range(2 * n)]
        return s

    @tile(state, state, row)
    def scale(e, s, a):
        return [e.mul(a[i // 2], s[i]) for i in range(2 * n)]

    return (
        shared_reader(REAL, places), shared_writer(REAL, places), channels, channels_of_rows,
        values, dots, add_products, scale,
    )  # fmt: skip


@cache
def make_solve(REAL):
    """Substitution, a column a lane: the next unknown is always the first one."""
    row = registers(BLOCK, REAL)

    @tile(row, row, row, REAL)
    def substitute(e, x, m, u):
        # what comes in at the end never gets to the front
        return [e.fma(m[i], u, x[i + 1]) for i in range(BLOCK - 1)] + x[:1]

    @tile(REAL, REAL, row, row, i32)
    def add_later(e, total, p, x, j):
        """Add p.x over the tokens from j on."""
        for i in range(BLOCK):
            total = e.select(e.less(e.u32(i), j), total, e.fma(p[i], x[i], total))
        return total

    get_row = shared_reader(REAL, tuple(range(0, BLOCK, 4)), 4)
    get_column = shared_reader(REAL, tuple(range(0, TILE, COLUMNS)))
    return substitute, add_later, get_row, get_column


@cache
def make_block(dtype, gate_dtype, KP):
    """Loading what both kernels want of a block of tokens."""
    REAL = real_of(dtype)
    get_column, get_gates, get_norms = (
        column_reader(x, REAL, BLOCK) for x in (dtype, gate_dtype or dtype, str(REAL))
    )
    get_real, real = reader(str(REAL), REAL), real_field(REAL)
    put_column = shared_writer(REAL, tuple(range(0, BLOCK * KP, KP)))
    prefixes, suffixes, products, scale, ones = make_tokens(REAL)
    size = ITEMSIZE[str(REAL)]
    PRE, SUFFIX, QUERIES = (TILES + KP + i * BLOCK * KP for i in range(3))
    zero = REAL(0)

    @device
    def load_channel(desc, x, norm, b, first, n, hv, c):
        """Channel c of K or Q, normalised, and of the decays: of what is not there 0 and 1."""
        g, factors = array_at(desc, G), array_at(desc, FACTORS)
        source, count = at(x, b, first, key_head(desc, hv)) + c * x[5], n if c < desc[K] else 0
        norms = get_norms(at(factors, b, first, hv) + norm * size, factors[3], n)
        numbers = products(get_column(source, x[3], count), norms)
        if gate_dtype is None:
            return numbers, ones()
        return numbers, exp_of(get_gates(at(g, b, first, hv) + c * g[5], g[3], count))

    @device
    def load_keys(desc, s, b, first, n, hv, c):
        """Channel c of e^G K, of e^(G_n - G) K and of the decay of the block."""
        x, d = load_channel(desc, array_at(desc, KEY), 1, b, first, n, hv, c)
        before = prefixes(d)
        set_element(s, TILES + c, before[BLOCK - 1])
        put_column(s, PRE + c, products(before, x))
        put_column(s, SUFFIX + c, products(suffixes(d), x))

    @device
    def load_queries(desc, s, b, first, n, hv, c):
        """Channel c of scale e^G Q."""
        x, d = load_channel(desc, array_at(desc, Q), 0, b, first, n, hv, c)
        put_column(s, QUERIES + c, products(prefixes(d), scale(x, real(desc[SCALE]))))

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
    get_state, put_state, channels, channels_of_rows, *others = _make_state(REAL, KP)
    values, dots, add_products, scale = others
    put_sums = shared_writer(REAL, tuple(range(0, ROWS * COLUMNS, COLUMNS)))
    get_parts = shared_reader(REAL, tuple(range(0, WARPS * TILE, TILE)))

    @tile(REAL, registers(WARPS, REAL))
    def add_up(e, parts):
        total = parts[0]
        for x in parts[1:]:
            total = e.add(total, x)
        return total

    @device
    def half(mine, other, high):
        """Either half of a warp goes on with one of the two columns."""
        return (other if high else mine) + shuffle_xor(mine if high else other, 16)

    @device
    def read_state(s, state, rows, group, lane, warp):
        """Leave the warp's part in the products of 16 rows with the state."""
        high = (lane & 16) != 0
        for i in range(0, BLOCK, ROWS):
            x = dots(state, channels_of_rows(s, rows + i * KP + group))
            sums = (
                half(x[0], x[1], high), half(x[2], x[3], high),
                half(x[4], x[5], high), half(x[6], x[7], high),
            )  # fmt: skip
            put_sums(s, PARTS + (warp * BLOCK + i) * COLUMNS + lane, sums)

    @device
    def sum_of_parts(s, i):
        return add_up(get_parts(s, PARTS + i))

    @device
    def write_state(s, state, rows, group, first, lane):
        """Add the products of 16 rows with 16 rows of values to the state."""
        column = first + (lane & 15)
        for i in range(0, BLOCK, ROWS):
            x = values(s, column + i * COLUMNS)
            state = add_products(state, channels_of_rows(s, rows + i * KP + group), x)
        return state

    @device
    def pass_block(s, state, group):
        return scale(state, channels(s, TILES + group))

    return get_state, put_state, read_state, sum_of_parts, write_state, pass_block

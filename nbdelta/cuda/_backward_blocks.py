"""Loading a block of 16 tokens, solving its triangular system, a state from and to memory.

A warp solves, a column a lane.
"""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK, FACTORS, PAIRS
from nbdelta.cuda._backward_state import (
    PITCH,
    TILE,
    WARPS,
    make_products,
    places_of,
    planes_of,
)
from nbdelta.cuda._backward_tokens import make_tokens, spread
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
from nbdelta.cuda._ptx import tile
from nbdelta.cuda._shared import element, set_element, shared_reader
from nbdelta.cuda._tile_functions import i32, int32, registers


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
    get_column = shared_reader(REAL, tuple(range(0, TILE, PITCH)))
    return substitute, add_later, get_row, get_column


@cache
def make_block(dtype, gate, KP):
    """Loading what both kernels want of a block of tokens; `gate` as theirs."""
    REAL = real_of(dtype)
    get_column, get_numbers = (column_reader(x, REAL, BLOCK) for x in (dtype, str(REAL)))
    get_real, real = reader(str(REAL), REAL), real_field(REAL)
    _, _, put_tile, *_ = make_products(dtype, KP)
    prefixes, suffixes, products, scale, ones, ones_after = make_tokens(REAL)
    size, by_warps = ITEMSIZE[str(REAL)], planes_of(dtype) > 0
    TILES, PRE, SUFFIX, QUERIES, _ = places_of(dtype, KP)
    zero = REAL(0)

    @device
    def of_tokens(address, step, n, lane):
        """A number of every token, the same for all channels: n of them, then zeros."""
        if not by_warps:
            return get_numbers(address, step, n)
        i = lane & (BLOCK - 1)
        return spread(get_real(address + i * step) if i < n else zero)

    @device
    def load_channel(desc, x, norm, b, first, n, hv, c):
        """Channel c of K or Q, normalised, and of the decays: of what is not there 0 and 1."""
        g, factors = array_at(desc, G), array_at(desc, FACTORS)
        source, count = at(x, b, first, key_head(desc, hv)) + c * x[5], n if c < desc[K] else 0
        norms = of_tokens(at(factors, b, first, hv) + norm * size, factors[3], n, c & 31)
        numbers = products(get_column(source, x[3], count), norms)
        if gate == "head":
            decays = of_tokens(at(g, b, first, hv), g[3], n, c & 31)
            return numbers, ones_after(decays, int32(n))
        if gate == "channel":
            decays = get_numbers(at(g, b, first, hv) + c * g[5], g[3], count)
            return numbers, ones_after(decays, int32(count))
        return numbers, ones()

    @device
    def load_keys(desc, s, b, first, n, hv, c):
        """Channel c of e^G K, of e^(G_n - G) K and of the decay of the block."""
        x, d = load_channel(desc, array_at(desc, KEY), 1, b, first, n, hv, c)
        before = prefixes(d)
        set_element(s, TILES + c, before[BLOCK - 1])
        put_tile(s, PRE, c, products(before, x))
        put_tile(s, SUFFIX, c, products(suffixes(d), x))

    @device
    def load_queries(desc, s, b, first, n, hv, c):
        """Channel c of scale e^G Q."""
        x, d = load_channel(desc, array_at(desc, Q), 0, b, first, n, hv, c)
        put_tile(s, QUERIES, c, products(prefixes(d), scale(x, real(desc[SCALE]))))

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
def make_staging(dtype, KP, wide):
    """Bringing a state from memory of any layout to shared memory, and back."""
    REAL, TILES = real_of(dtype), places_of(dtype, KP)[0]
    get, put = read_real(REAL, wide), write_real(REAL, wide)
    zero = REAL(0)

    @device
    def bring(desc, s, x, n, hv, first, tid):
        column = first + (tid & 31)
        for c in range(tid >> 5, KP, WARPS):
            value = zero
            if x[0] != 0 and c < desc[K] and column < desc[V]:
                value = get(x[1], at(x, n, hv, c) + column * x[5])
            set_element(s, TILES + c * PITCH + (tid & 31), value)

    @device
    def take(desc, s, x, n, hv, first, tid):
        column = first + (tid & 31)
        if column < desc[V]:
            for c in range(tid >> 5, desc[K], WARPS):
                put(
                    x[1],
                    at(x, n, hv, c) + column * x[5],
                    element(s, TILES + c * PITCH + (tid & 31)),
                )

    return bring, take

"""A block of threads' part of a state, 32 columns of V, and what 16 tokens and it do to each other.

In float64 a thread has two columns of every 16th group of four channels, and multiplies and adds.
For other dtypes S^T is in the accumulators of the tensor cores, as in ``_chunk_scan.py``: a warp
has 16 columns and a quarter of the channels. Everything is multiplied as a sum of bfloat16 numbers
("planes", see ``_tiles.py``): three of them hold a float32, two more than inputs of 16 bits need.

Tiles of 16 tokens lie there transposed, a channel's tokens in 32 bytes of which every other four
channels have the two halves swapped, so that eight channels in a row are in different banks.
"""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK
from nbdelta.cuda._jit import device
from nbdelta.cuda._memory import real_of
from nbdelta.cuda._ptx import shared_address, shuffle_xor, tile
from nbdelta.cuda._shared import shared_reader, shared_writer
from nbdelta.cuda._tile_functions import registers, u32, uint32, void
from nbdelta.cuda._tiles import make_columns, make_scale, multiply, split

THREADS, WARPS = 256, 8
COLUMNS = 32
# of a row of columns in shared memory, with a gap against bank conflicts
PITCH = COLUMNS + 4
TILE = BLOCK * PITCH
# numbers in shared memory: triangles, betas, three tiles of tokens and columns, parts of a sum
M, P, BETA = 0, 256, 512
X, U, RIGHT, PARTS = (528 + i * TILE for i in range(4))
# of tokens, at once, where threads multiply
ROWS = 4
# of channels, where warps do
QUARTERS = 4


def planes_of(dtype):
    """Planes of what is multiplied on tensor cores; 0: it is not."""
    return {"float64": 0, "float32": 3}.get(dtype, 2)


@cache
def places_of(dtype, KP):
    """Where in shared memory the decay of a block is, one number a channel, and its tiles after.

    Returns
    -------
    tuple of int
        TILES, PRE, SUFFIX, QUERIES, and the end. A state on its way starts at TILES as well.
    """
    planes = planes_of(dtype)
    parts = QUARTERS if planes else WARPS
    first = -(-(PARTS + parts * TILE) // 32) * 32
    tile = BLOCK * KP * planes // 2 if planes else BLOCK * KP
    return (first, *(first + KP + i * tile for i in range(4)))


def shared_bytes(dtype, KP, tiles):
    """Bytes of dynamic shared memory for so many tiles."""
    first, *ends = places_of(dtype, KP)
    return max(ends[tiles], first + PITCH * KP) * (8 if dtype == "float64" else 4)


@cache
def make_products(dtype, KP):
    """What a block of tokens and the state do to each other.

    Returns
    -------
    tuple of functions
        ``get_state(s, tid)`` and ``put_state(s, tid, state)``: a thread's part of a state that is
        on its way; ``put_tile(s, rows, c, numbers)``: channel c of 16 tokens;
        ``read_state(s, state, rows, tid)``: leave parts of the products of 16 rows with the state;
        ``sum_of_parts(s, i)``: what they make; ``write_state(s, state, rows, first, tid)``: the
        state and the products of 16 rows with 16 rows of values; ``pass_block(s, state, tid)``: the
        state times the decay of the block.
    """
    return _make_by_warps(dtype, KP) if planes_of(dtype) else _make_by_threads(dtype, KP)


def _make_sum(REAL, parts):
    get_parts = shared_reader(REAL, tuple(range(0, parts * TILE, TILE)))

    @tile(REAL, registers(parts, REAL))
    def add_up(e, parts):
        total = parts[0]
        for x in parts[1:]:
            total = e.add(total, x)
        return total

    @device
    def sum_of_parts(s, i):
        return add_up(get_parts(s, PARTS + i))

    return sum_of_parts


def _make_by_warps(dtype, KP):
    """A part is what a quarter of the channels makes; for planes of 16 bits on tensor cores."""
    REAL, planes, n = real_of(dtype), planes_of(dtype), KP // QUARTERS
    kind, plane_bytes, step = "bf16", 2 * BLOCK * KP, 2 * BLOCK * BLOCK
    TILES = places_of(dtype, KP)[0]

    def fragment(columns):
        """Places of a lane's numbers in rows of columns, as accumulators have them."""
        return tuple(PITCH * (8 * (i // 4) + i % 2) + i // 2 % 2 * 8 for i in range(columns // 2))

    get_fragment, put_fragment = shared_reader(REAL, fragment(n)), shared_writer(REAL, fragment(n))
    get_values, put_sums = (f(REAL, fragment(BLOCK)) for f in (shared_reader, shared_writer))
    decays, scale = make_columns(n // 4), make_scale(n // 2)

    @tile(void, u32, registers(BLOCK))
    def store_tokens(e, address, x):
        for p, plane in enumerate(split(e, kind, planes, x)):
            e.store_shared(address, plane[:4], p * plane_bytes)
            e.store_shared(e.xor(address, e.u32(16)), plane[4:], p * plane_bytes)

    @tile(registers(8), registers(n // 2), u32)
    def read(e, state, address):
        out = [e.f32(0.0)] * 8
        for i in range(n // 16):
            left = split(e, kind, planes, state[8 * i : 8 * i + 8])
            right = [e.ldmatrix(address, p * plane_bytes + i * step, True) for p in range(planes)]
            for h in (0, 4):
                columns = [r[h // 2 : h // 2 + 2] for r in right]
                out[h : h + 4] = multiply(e, kind, out[h : h + 4], left, columns)
        return out

    @tile(registers(n // 2), registers(n // 2), registers(8), u32)
    def write(e, state, values, address):
        # a sum of its own for every block, as in `make_update`
        left = split(e, kind, planes, values)
        for i in range(n // 16):
            right = [e.ldmatrix(address, p * plane_bytes + i * step) for p in range(planes)]
            for h in (0, 4):
                columns, o = [r[h // 2 : h // 2 + 2] for r in right], 8 * i + h
                total = multiply(e, kind, [e.f32(0.0)] * 4, left, columns)
                state[o : o + 4] = [e.add(x, y) for x, y in zip(state[o : o + 4], total)]
        return state

    @device
    def own_place(tid):
        """Of a lane's first number in rows of columns."""
        return (tid & 3) * 2 * PITCH + (tid >> 5 & 1) * 16 + (tid >> 2 & 7)

    @device
    def first_channel(tid):
        return (tid >> 6) * n

    @device
    def address_of(s, rows, row, half):
        """Of half the tokens of a row."""
        return uint32(shared_address(s) + 4 * rows + 32 * row + ((half ^ (row >> 2 & 1)) << 4))

    @device
    def get_state(s, tid):
        return get_fragment(s, TILES + first_channel(tid) * PITCH + own_place(tid))

    @device
    def put_state(s, tid, state):
        put_fragment(s, TILES + first_channel(tid) * PITCH + own_place(tid), state)

    @device
    def put_tile(s, rows, c, numbers):
        store_tokens(address_of(s, rows, c, 0), numbers)

    @device
    def read_state(s, state, rows, tid):
        row = first_channel(tid) + (tid & 15)
        sums = read(state, address_of(s, rows, row, tid >> 4 & 1))
        put_sums(s, PARTS + (tid >> 6) * TILE + own_place(tid), sums)

    @device
    def write_state(s, state, rows, first, tid):
        row = first_channel(tid) + (tid & 7) + ((tid >> 4 & 1) << 3)
        values = get_values(s, first + own_place(tid))
        return write(state, values, address_of(s, rows, row, tid >> 3 & 1))

    @device
    def pass_block(s, state, tid):
        own = TILES + first_channel(tid) + 2 * (tid & 3)
        return scale(state, decays(uint32(shared_address(s) + 4 * own)))

    return (
        get_state, put_state, put_tile, read_state, _make_sum(REAL, QUARTERS), write_state,
        pass_block,
    )  # fmt: skip


def _make_by_threads(dtype, KP):
    """A part is what the channels of a warp make."""
    REAL, n = real_of(dtype), KP // 16
    TILES = places_of(dtype, KP)[0]
    state, row, rows_of, pairs = (registers(x, REAL) for x in (2 * n, n, ROWS * n, 2 * ROWS))
    # four channels of every 64
    places = tuple(PITCH * (64 * (c // 4) + c % 4) + 16 * j for c in range(n) for j in range(2))
    get_places, put_places = shared_reader(REAL, places), shared_writer(REAL, places)
    channels, channels_of_rows = (
        shared_reader(REAL, tuple(KP * i + c for i in range(m) for c in range(0, KP, 64)), 4)
        for m in (1, ROWS)
    )
    values = shared_reader(REAL, tuple(PITCH * i + 16 * j for i in range(ROWS) for j in range(2)))
    put_sums = shared_writer(REAL, tuple(range(0, ROWS * PITCH, PITCH)))
    put_column = shared_writer(REAL, tuple(range(0, BLOCK * KP, KP)))

    @tile(pairs, state, rows_of)
    def dots(e, s, a):
        out = []
        for i in range(0, ROWS * n, n):
            own = [e.mul(a[i], s[j]) for j in range(2)]
            for c in range(1, n):
                own = [e.fma(a[i + c], s[2 * c + j], own[j]) for j in range(2)]
            out += own
        return out

    @tile(state, state, rows_of, pairs)
    def add_products(e, s, a, u):
        for i in range(ROWS):
            s = [e.fma(a[n * i + c // 2], u[2 * i + c % 2], s[c]) for c in range(2 * n)]
        return s

    @tile(state, state, row)
    def scale(e, s, a):
        return [e.mul(a[i // 2], s[i]) for i in range(2 * n)]

    @device
    def half(mine, other, high):
        """Either half of a warp goes on with one of the two columns."""
        return (other if high else mine) + shuffle_xor(mine if high else other, 16)

    @device
    def first_channel(tid):
        return tid >> 4 << 2

    @device
    def get_state(s, tid):
        return get_places(s, TILES + first_channel(tid) * PITCH + (tid & 15))

    @device
    def put_state(s, tid, state):
        put_places(s, TILES + first_channel(tid) * PITCH + (tid & 15), state)

    @device
    def put_tile(s, rows, c, numbers):
        put_column(s, rows + c, numbers)

    @device
    def read_state(s, state, rows, tid):
        high = (tid & 16) != 0
        for i in range(0, BLOCK, ROWS):
            x = dots(state, channels_of_rows(s, rows + i * KP + first_channel(tid)))
            sums = (
                half(x[0], x[1], high), half(x[2], x[3], high),
                half(x[4], x[5], high), half(x[6], x[7], high),
            )  # fmt: skip
            put_sums(s, PARTS + (tid >> 5) * TILE + i * PITCH + (tid & 31), sums)

    @device
    def write_state(s, state, rows, first, tid):
        for i in range(0, BLOCK, ROWS):
            x = values(s, first + (tid & 15) + i * PITCH)
            a = channels_of_rows(s, rows + i * KP + first_channel(tid))
            state = add_products(state, a, x)
        return state

    @device
    def pass_block(s, state, tid):
        return scale(state, channels(s, TILES + first_channel(tid)))

    return (
        get_state, put_state, put_tile, read_state, _make_sum(REAL, WARPS), write_state, pass_block,
    )  # fmt: skip

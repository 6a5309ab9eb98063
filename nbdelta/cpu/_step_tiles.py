"""Operations of one token on a state, one vector emitter function each.

A step reads the state twice and writes it once. Whole rows are read and written in the order in
which they lie in memory, ``ROWS`` at a time: sums over the rows are kept for all columns, and every
number of the state meets its two multiply-adds while it is in a register.
"""

from nbdelta.cpu._simd import REAL, size_of, tile
from nbdelta.cpu._vector_unit import DOTS_BFLOAT16, LINE, W

ROWS = 4  # with their factors, two sums and the state they fit into 16 registers


@tile
def inverse_norm(e, x, n, eps) -> REAL:
    """1 / sqrt(sum of n squares + eps)."""

    def body(offset, acc):
        value = e.load(x + offset)
        return [e.fma(value, value, acc[0])]

    (squares,) = e.loop(n * e.size, [e.splat(0.0)], body, e.row)
    return 1.0 / e.sqrt(e.total(squares) + eps)


@tile
def scale_row(e, x, factor, n):
    """X *= factor for n numbers in place."""

    def body(offset, carried):
        e.store(e.load(x + offset) * e.splat(factor), x + offset)
        return carried

    e.loop(n * e.size, [], body, e.row)


@tile
def dot_row(e, x, y, n) -> REAL:
    """Sum of n products."""

    def body(offset, acc):
        return [e.fma(e.load(x + offset), e.load(y + offset), acc[0])]

    (products,) = e.loop(n * e.size, [e.splat(0.0)], body, e.row)
    return e.total(products)


@tile
def channel_gates(e, k, q, g, n, out):
    """Rows of n channels e^g k, e^g q and e^g one behind the other at `out`."""
    width = n * e.size

    def body(offset, carried):
        decay = e.exp(e.load(g + offset))
        e.store(e.load(k + offset) * decay, out + offset)
        e.store(e.load(q + offset) * decay, out + width + offset)
        e.store(decay, out + width * 2 + offset)
        return carried

    e.loop(width, [], body, e.row)


@tile
def head_gate(e, k, q, g, n, out):
    """As `channel_gates`, with one log decay for all channels, 16 times at `g`."""
    width = n * e.size
    decay = e.exp(e.load(g))

    def body(offset, carried):
        e.store(e.load(k + offset) * decay, out + offset)
        e.store(e.load(q + offset) * decay, out + width + offset)
        e.store(decay, out + width * 2 + offset)
        return carried

    e.loop(width, [], body, e.row)


def paired(dtype):
    """Whether 16 columns of a state are computed on as the 8 even and the 8 odd ones.

    It takes one instruction for each to get them out of bfloat16 in this way. Where there is an
    instruction that rounds to bfloat16, whole registers are quicker.
    """
    return dtype == "bfloat16" and not DOTS_BFLOAT16


@tile
def finish_sums(e, dtype, v, beta, scale, qk, n, sums, o):
    """The error d = beta (v - S^T k), in place of the sums S^T k, and o = scale (S^T q + (q.k) d).

    The state is the decayed one. With that the output needs no look at the updated state.
    """
    width = n * e.size
    even_odd = [*range(0, W, 2), *range(1, W, 2)]
    natural = [even_odd.index(i) for i in range(W)]

    def body(offset, carried):
        x = e.load(v + offset)
        if paired(dtype):
            x = e.shuffle(x, x, even_odd)
        d = (x - e.load(sums + offset)) * e.splat(beta)
        y = e.fma(d, e.splat(qk), e.load(sums + width + offset)) * e.splat(scale)
        if paired(dtype):
            y, d = e.shuffle(y, y, natural), e.plain_nan(d)
        e.store(y, o + offset)
        e.store(d, sums + offset)
        return carried

    e.loop(width, [], body, e.row)


# ---- whole rows of a state, a register of columns after the other ----


def _lanes(e, dtype):
    return W // 2 if paired(dtype) else e.lanes


def _over_columns(e, dtype, state, n, body):
    """Emit ``body(columns)`` for all n columns of a row, a register at a time.

    Registers begin where `state` is aligned on their size, or on 16 bytes. What is before the first
    and after the last one goes together as one register, of which `columns` are the first ones of
    its parts. NumPy's arrays begin 16 bytes behind a line: with half of all accesses across lines a
    step took a quarter longer.
    """
    lanes, part = _lanes(e, dtype), 16 // size_of(dtype)

    def loop(first, end, *offsets):
        def emit(i, carried):
            for offset in offsets:
                body([first + i + offset])
            return carried

        e.loop(end - first, [], emit, len(offsets) * lanes, maybe_empty=True)

    if paired(dtype):
        e.loop(n, [], lambda column, carried: body([column]) or carried, W)
        return
    begin, end = e.integer(0), n
    if size_of(dtype) == e.size and lanes > part:
        width = lanes * e.size
        begin = (width - state % width) // 16 * part % lanes
        end = n - (lanes - begin) % lanes
        columns = [e.integer(i) for i in range(0, lanes, part)]
        columns = [e.select(i, "<", begin, i, i + (n - lanes)) for i in columns]
        e.loop(begin, [], lambda _, carried: body(columns) or carried, lanes, maybe_empty=True)
    pairs = begin + (end - begin) // (2 * lanes) * (2 * lanes)
    loop(begin, pairs, 0, lanes)
    loop(pairs, end, 0)


def load_state(e, dtype, address, columns):
    """Columns of a state as a list of registers."""
    if paired(dtype):
        return e.load_pairs(address + columns[0] * 2)
    size, lanes = size_of(dtype), e.lanes // len(columns)
    return [e.join([e.load_as(dtype, address + c * size, lanes) for c in columns])]


def store_state(e, dtype, values, address, columns):
    if paired(dtype):
        e.store_pairs(values, address + columns[0] * 2)
        return
    if dtype == "bfloat16":
        e.store_halves(e.halves(values[0]), address + columns[0] * 2)
        return
    for c, value in zip(columns, e.split(values[0], len(columns)), strict=True):
        e.store_as(dtype, value, address + c * size_of(dtype), e.lanes // len(columns))


def scratch_row(e, dtype, address, columns):
    """Numbers of a row of scratch in registers, as `_load` has them."""
    if paired(dtype):
        starts = [columns[0], columns[0] + W // 2]
        return [e.load(address + c * e.size, 0, W // 2) for c in starts]
    lanes = e.lanes // len(columns)
    return [e.join([e.load(address + c * e.size, 0, lanes) for c in columns])]


def _add(e, dtype, address, columns, factors, state):
    """Add the products of factors and registers of the state to a row of scratch."""
    sums = scratch_row(e, dtype, address, columns)
    for factor, s in zip(factors, state, strict=True):
        sums = [e.fma(x, factor, y) for x, y in zip(s, sums, strict=True)]
    if paired(dtype):
        columns = [columns[0], columns[0] + W // 2]
    else:
        store_scratch(e, sums[0], address, columns)
        return
    for c, x in zip(columns, sums, strict=True):
        e.store(x, address + c * e.size)


def store_scratch(e, value, address, columns):
    for c, x in zip(columns, e.split(value, len(columns)), strict=True):
        e.store(x, address + c * e.size)


def _factors(e, dtype, address, rows):
    values = [e.bcast(address, i * e.size, _lanes(e, dtype)) for i in range(rows)]
    return [e.plain_nan(x) for x in values] if paired(dtype) else values


def _fetch(e, dtype, ahead, column, rows):
    """Bring half as many bytes into the cache as the rows have in the columns of a register."""
    half = rows * size_of(dtype) // 2
    for line in range(0, half * (W if paired(dtype) else e.lanes), LINE):
        e.prefetch(ahead + column * half + line)


def _state_rows(rows):
    """Make the tiles that read and write `rows` rows of a state [K, V].

    Both fetch half as many bytes from `ahead` on, so that what comes later is brought into the
    cache evenly over the whole step. A single row fetches nothing.
    """

    @tile
    def read_rows(e, dtype, source, step, n, gated, width, sums, second, ahead):
        """Sums += S^T e^g k, and `second` bytes further += S^T e^g q, for n columns."""
        keys, queries = _factors(e, dtype, gated, rows), _factors(e, dtype, gated + width, rows)

        def body(columns):
            if rows > 1:
                _fetch(e, dtype, ahead, columns[0], rows)
            state = [load_state(e, dtype, source + step * i, columns) for i in range(rows)]
            _add(e, dtype, sums, columns, keys, state)
            _add(e, dtype, sums + second, columns, queries, state)

        _over_columns(e, dtype, source, n, body)

    @tile
    def write_rows(e, dtype, source, step, target, target_step, n, k, decay, d, ahead):
        """S = e^g S + k d^T for n columns."""
        keys, decays = _factors(e, dtype, k, rows), _factors(e, dtype, decay, rows)

        def body(columns):
            if rows > 1:
                _fetch(e, dtype, ahead, columns[0], rows)
            errors = scratch_row(e, dtype, d, columns)
            for i in range(rows):
                s = load_state(e, dtype, source + step * i, columns)
                s = [e.fma(keys[i], x, y * decays[i]) for x, y in zip(errors, s, strict=True)]
                store_state(e, dtype, s, target + target_step * i, columns)

        _over_columns(e, dtype, source, n, body)

    return read_rows, write_rows


read_rows, write_rows = _state_rows(ROWS)
read_row, write_row = _state_rows(1)


@tile
def read_values(e, dtype, source, step, n, gated, width, sums, second, ahead):
    """As `read_rows`, for 16 rows of a state [V, K].

    Every sum goes over the keys in their order here too: squares of the state are transposed in
    registers.
    """
    lanes, size = e.lanes, size_of(dtype)
    groups = range(0, W, lanes)
    total = [e.load(x, c * e.size, lanes) for x in (sums, sums + second) for c in groups]

    def body(key, total):
        a, b = total[: len(groups)], total[len(groups) :]
        for line in range(lanes * size * W // (2 * LINE)):
            e.prefetch(ahead + key * (size * W // 2) + line * LINE)
        for g, first in enumerate(groups):
            start = source + step * first + key * size
            square = [e.load_as(dtype, start + step * i, lanes) for i in range(lanes)]
            for i, s in enumerate(e.transpose(square)):
                place = gated + key * e.size
                a[g] = e.fma(s, e.bcast(place, i * e.size, lanes), a[g])
                b[g] = e.fma(s, e.bcast(place + width, i * e.size, lanes), b[g])
        return [*a, *b]

    total = e.loop(n, total, body, lanes)
    for i, x in enumerate(total):
        place = sums if i < len(groups) else sums + second
        e.store(x, place, i % len(groups) * lanes * e.size)


@tile
def write_values(e, dtype, source, step, target, target_step, n, k, decay, d, ahead):
    """As `write_rows`, for 16 rows of a state [V, K]."""
    for first in range(0, W, ROWS):
        values = range(first, first + ROWS)
        errors = [e.bcast(d, i * e.size, e.lanes) for i in values]

        def body(column, carried, values=values, errors=errors, first=first):
            start = ahead + n * (first * size_of(dtype) // 2)
            for c in range(0, W, e.lanes):
                _fetch(e, dtype, start, column + c, ROWS)
                x = e.load(k + column * e.size, c * e.size, e.lanes)
                w = e.load(decay + column * e.size, c * e.size, e.lanes)
                for i, error in zip(values, errors, strict=True):
                    place = (column + c) * size_of(dtype)
                    s = e.load_as(dtype, source + step * i + place, e.lanes)
                    s = e.fma(x, error, s * w)
                    e.store_as(dtype, s, target + target_step * i + place, e.lanes)
            return carried

        e.loop(n, [], body, W)

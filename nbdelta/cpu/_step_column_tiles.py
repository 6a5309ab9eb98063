"""One token on a state [K, V], as `_step_tiles` has it, with the sums of some columns in registers.

A row of the state goes by in one piece, which the processor foresees, and sums do not go through
memory. It takes the 32 registers of AVX-512.
"""

from nbdelta.cpu._simd import constant_of, size_of, tile
from nbdelta.cpu._step_tiles import load_state, scratch_row, store_scratch, store_state
from nbdelta.cpu._vector_unit import FORESEES_ROWS, LINE, native_lanes

HELD = 8  # registers of columns: with two sums each they take half of the 32 registers of AVX-512

columns_held = constant_of(lambda size: HELD * native_lanes(size))


def _over_registers(e, dtype, state, emit):
    """Run ``emit(registers)`` with the columns of each of `HELD` registers, as `_over_columns`."""
    lanes, part = e.lanes, 16 // size_of(dtype)
    aligned = [[e.integer(i * lanes)] for i in range(HELD)]
    width = lanes * e.size
    if size_of(dtype) != e.size:
        emit(aligned)
        return
    begin = (width - state % width) // 16 * part % lanes
    first = [e.integer(i) for i in range(0, lanes, part)]
    split = [e.select(i, "<", begin, i, i + (HELD - 1) * lanes) for i in first]
    apart = [[begin + i * lanes] for i in range(HELD - 1)] + [split]
    e.choose(e.select(begin, "<", 1, 0, 1), lambda i: emit(apart if i else aligned), 2)


def _fetch_half(e, dtype, ahead):
    """Fetch half a row: of 32 or 64 bits into the second cache, or not at all."""
    wide = size_of(dtype) > 2
    if wide and FORESEES_ROWS:
        return
    for line in range(0, HELD * e.lanes * size_of(dtype) // 2, LINE):
        e.prefetch(ahead + line, second=wide)


@tile
def read_columns(e, dtype, source, step, K, gated, width, sums, second, ahead, reach):
    """Sums = S^T e^g k, and `second` bytes further = S^T e^g q, over all keys.

    From `ahead` on `reach` bytes a key are fetched, half of what is read.
    """

    def emit(registers):
        def body(offset, carried):
            *acc, row, ahead = carried
            _fetch_half(e, dtype, ahead)
            factors = [e.bcast(gated + offset, 0, e.lanes) for gated in (keys, queries)]
            for r, columns in enumerate(registers):
                (state,) = load_state(e, dtype, row, columns)
                for i, factor in enumerate(factors):
                    acc[2 * r + i] = e.fma(state, factor, acc[2 * r + i])
            return [*acc, row + step, ahead + reach]

        keys, queries = gated, gated + width
        zeros = [e.splat(0.0, e.lanes)] * (2 * HELD)
        *acc, _, _ = e.loop(K * e.size, [*zeros, source, ahead], body, e.size)
        for r, columns in enumerate(registers):
            for i in range(2):
                store_scratch(e, acc[2 * r + i], sums + second * i, columns)

    _over_registers(e, dtype, source, emit)


@tile
def write_columns(e, dtype, source, step, target, target_step, K, k, decay, d, ahead, reach):
    """S = e^g S + k d^T over all keys, the last one first."""

    def emit(registers):
        errors = [scratch_row(e, dtype, d, columns)[0] for columns in registers]

        def body(offset, carried):
            row, written, ahead = carried
            _fetch_half(e, dtype, ahead)
            at = last - offset
            key, kept = e.bcast(k + at, 0, e.lanes), e.bcast(decay + at, 0, e.lanes)
            for columns, error in zip(registers, errors):
                (state,) = load_state(e, dtype, row, columns)
                store_state(e, dtype, [e.fma(key, error, state * kept)], written, columns)
            return [row - step, written - target_step, ahead + reach]

        keys = K - 1
        last = keys * e.size
        start = [source + step * keys, target + target_step * keys, ahead]
        e.loop(K * e.size, start, body, e.size)

    _over_registers(e, dtype, source, emit)

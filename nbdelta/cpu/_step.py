"""One token on one state, where the state lies.

A step reads the state front to back for the sums S^T e^g k and S^T e^g q, and writes it back to
front, since what was read last is still in the cache. With `far` each pass fetches half a state:
the second half of this one, then the first half of the one behind it, or none with `alone`, where
another thread may write to that one. Source and target may be the same.

All forms of the same numbers in memory give the same bits: every sum goes over the keys in order.
``STATE`` is the NumPy type of the numbers of the state, ``np.uint16`` for bfloat16.
"""

from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import zero_rows
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._step_column_tiles import columns_held, read_columns, write_columns
from nbdelta.cpu._step_tiles import (
    ROWS,
    finish_sums,
    read_row,
    read_rows,
    read_values,
    write_row,
    write_rows,
    write_values,
)
from nbdelta.cpu._vector_unit import BITS, LINE, W

HOLDS_SUMS = BITS == 512  # in registers, of which there are enough


@njit()
def _step_by_columns(
    REAL, STATE, source, step, target, target_step, K, V, far, alone, k, gated, v, beta, scale, qk,
    sums, o,
):  # fmt: skip
    """As `step`, for as many columns at a time as have their sums in registers."""
    SIZE, size, held = itemsize(REAL), itemsize(STATE), columns_held(REAL)
    key, second = (K + W - 1) // W * W * SIZE, V * SIZE
    decay = gated + 2 * key
    ahead, reach = source + K * V * size // 2 * far, held * size // 2 * far
    for c in range(0, V, held):
        read_columns(
            REAL, STATE, source + c * size, step, K, gated, key, sums + c * SIZE, second, ahead,
            reach,
        )  # fmt: skip
        ahead += K * reach
    finish_sums(REAL, STATE, v, beta, scale, qk, V, sums, o)
    if alone:
        ahead, reach = source, 0
    for c in range(V - held, -1, -held):
        write_columns(
            REAL, STATE, source + c * size, step, target + c * size, target_step, K, k, decay,
            sums + c * SIZE, ahead, reach,
        )  # fmt: skip
        ahead += K * reach


@njit()
def step(
    REAL, STATE, source, step, target, target_step, K, V, far, alone, k, gated, v, beta, scale, qk,
    sums, o,
):  # fmt: skip
    """One token on a state [K, V] with contiguous values, a multiple of 16 of them."""
    SIZE, half = itemsize(REAL), V * itemsize(STATE) // 2
    key, second = (K + W - 1) // W * W * SIZE, V * SIZE
    decay = gated + 2 * key
    # registers of sums are to be aligned where those of the state are
    sums += source % LINE
    if HOLDS_SUMS:
        if V % columns_held(REAL) == 0:
            _step_by_columns(
                REAL, STATE, source, step, target, target_step, K, V, far, alone, k, gated, v, beta,
                scale, qk, sums, o,
            )  # fmt: skip
            return
    ahead, reach = source + K * half * far, ROWS * half * far
    zero_rows(REAL, sums, 2 * V // W)
    i = 0
    while i + ROWS <= K:
        rows, at = source + i * step, gated + i * SIZE
        read_rows(REAL, STATE, rows, step, V, at, key, sums, second, ahead)
        ahead += reach
        i += ROWS
    while i < K:
        rows, at = source + i * step, gated + i * SIZE
        read_row(REAL, STATE, rows, step, V, at, key, sums, second, ahead)
        i += 1
    finish_sums(REAL, STATE, v, beta, scale, qk, V, sums, o)
    if alone:
        ahead, reach = source, 0
    while i % ROWS:
        i -= 1
        rows, written, at = source + i * step, target + i * target_step, i * SIZE
        write_row(REAL, STATE, rows, step, written, target_step, V, k + at, decay + at, sums, ahead)
    while i:
        i -= ROWS
        rows, written, at = source + i * step, target + i * target_step, i * SIZE
        write_rows(
            REAL, STATE, rows, step, written, target_step, V, k + at, decay + at, sums, ahead
        )
        ahead += reach


@njit()
def step_v_first(
    REAL, STATE, source, step, target, target_step, K, V, far, alone, k, gated, v, beta, scale, qk,
    sums, o,
):  # fmt: skip
    """One token on a state [V, K] with contiguous keys; K and V are multiples of 16."""
    SIZE, half = itemsize(REAL), K * itemsize(STATE) // 2
    key, second = K * SIZE, V * SIZE
    zero_rows(REAL, sums, 2 * V // W)
    ahead, reach = source + V * half * far, W * half * far
    for i in range(0, V, W):
        rows, at = source + i * step, sums + i * SIZE
        read_values(REAL, STATE, rows, step, K, gated, key, at, second, ahead)
        ahead += reach
    finish_sums(REAL, REAL, v, beta, scale, qk, V, sums, o)
    if alone:
        ahead, reach = source, 0
    for i in range(V - W, -1, -W):
        rows, written, d = source + i * step, target + i * target_step, sums + i * SIZE
        write_values(REAL, STATE, rows, step, written, target_step, K, k, gated + 2 * key, d, ahead)
        ahead += reach

"""Memory of a worker of the backward kernel, beside the forward kernel's for every block."""

from typing import NamedTuple

from nbdelta.cpu._backward_state_tiles import ROWS_BEHIND
from nbdelta.cpu._jit import njit
from nbdelta.cpu._vector_unit import W

# Blocks of a chunk: its states at every block's start are made anew from the one that was kept.
# Memory for twice as many states costs the forward pass more time than it saves here.
BLOCKS = 8
CHUNK = BLOCKS * W


class Work(NamedTuple):
    """Addresses of a worker's buffers."""

    blocks: int  # one forward scratch for each block of a chunk
    block_step: int
    states: int  # strips of the state at every block's start, with what is behind them
    strip_step: int
    state_step: int
    dstates: int  # strips of the gradient of the state, of every value head
    dstate_step: int
    dq: int  # of every block, collected over the value heads
    dk: int
    pairs: int  # of every block: wp and wa, added up over the value heads
    beta: int  # of every block, and 1 / beta
    dv: int  # rows of Y
    do: int  # staged rows
    do_columns: int  # panels of dO, Y and U with the value columns as rows
    y_columns: int
    u_columns: int
    do_rows: int  # rows of dO and Y of a strip with the factors of their gates
    y_rows: int
    do_tile: int  # those without
    y_tile: int
    at: int  # -M and P with the reading token as row
    pt: int
    u_do: int
    u_y: int
    wp: int  # see pair_weights
    wpt: int  # wp transposed
    wa: int
    dbeta: int  # lanes that add up to the gradients of 16 betas
    kept: int  # see state_gradient
    reads_q: int  # KDA: columns, then rows of what goes through the state
    reads_k: int
    writes: int
    running: int  # KDA: the products of every pair of tokens, 16 channels
    back: int
    dg: int  # gradients of the gate, KDA: rows
    ones: int
    row: int  # single rows
    reads_row: int
    writes_row: int
    drate: int  # of every value head: lanes for A_log, then a row for dt_bias
    drate_step: int
    end: int


def work_layout(start, size, KP, VP, r, per_channel, block_step):
    """Carve a worker's memory: padded head sizes, r value heads a key head, `size` bytes a number,
    and the bytes of the forward kernel's scratch.

    Compiled into the kernel, and called as it is by the host, which wants to know the end.
    """
    row = W * size
    square, tokens, values = W * row, KP * row, VP * row
    channels = tokens if per_channel else row
    strip_step = (KP + ROWS_BEHIND) * row
    state_step, dstate_step = VP // W * strip_step, VP // W * tokens
    states = start + BLOCKS * block_step
    dstates = states + BLOCKS * state_step
    dq = dstates + r * dstate_step
    dk = dq + BLOCKS * tokens
    pairs = dk + BLOCKS * tokens
    beta = pairs + BLOCKS * 2 * square
    dv = beta + BLOCKS * 2 * row
    do = dv + values
    columns = do + values
    rows = columns + 3 * values
    squares = rows + 2 * square
    kept = squares + 10 * square
    reads = kept + tokens
    running = reads + 3 * tokens
    back = running + W * square
    dg = back + square
    ones = dg + channels
    drate = ones + 4 * row
    drate_step = row + KP * size
    return Work(
        start, block_step, states, strip_step, state_step, dstates, dstate_step, dq, dk, pairs,
        beta, dv,
        do, columns, columns + values, columns + 2 * values, rows, rows + square, squares,
        squares + square, squares + 2 * square, squares + 3 * square, squares + 4 * square,
        squares + 5 * square, squares + 6 * square, squares + 7 * square, squares + 8 * square,
        squares + 9 * square, kept, reads, reads + tokens, reads + 2 * tokens, running, back, dg,
        ones, ones + row, ones + 2 * row, ones + 3 * row, drate, drate_step,
        drate + r * drate_step,
    )  # fmt: skip


work_layout_of = njit()(work_layout)  # the same, for kernels

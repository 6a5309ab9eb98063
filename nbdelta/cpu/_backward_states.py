"""U, E and the states of a chunk's blocks, made anew from what the forward pass kept."""

from functools import cache

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu._backward_state_tiles import (
    SUFFIX_ROWS,
    advance,
    reciprocal,
    solve_errors,
    spread_rows,
)
from nbdelta.cpu._call import VALUE, K, V, array_at
from nbdelta.cpu._chunk_panels import load_beta, token_rows
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import (
    fill_row,
    load,
    save,
    transpose_tile,
)
from nbdelta.cpu._simd import itemsize, padded, rows_of_tile
from nbdelta.cpu._tiles import DECAY, SUFFIX
from nbdelta.cpu._vector_unit import W


@njit()
def _clear_pairs(REAL, n, x):
    """Tokens after the end of a sequence are in no pair."""
    size = itemsize(REAL)
    for j in range(W):
        for i in range(n if j < n else 0, W):
            save(REAL, x + (j * W + i) * size, REAL(0))


# of U = beta E there is a way back to E unless beta is 0 or about to overflow or underflow
LEAST_BETA, LARGEST_BETA = 2.0**-60, 2.0**60


@njit()
def _can_divide(REAL, n, beta):
    for i in range(n):
        size = abs(load(REAL, beta + i * itemsize(REAL)))
        if not LEAST_BETA <= size <= LARGEST_BETA:
            return False
    return True


@cache
def forward_block(PER_CHANNEL):
    head_gates, channel_gates = panels.head_gates(False), panels.channel_gates(False)

    @njit()
    def forward_block(REAL, desc, m, w, b, t, n, hv, kept, beta, per_beta, state, has_next):
        """Gates, triangles, E and U of a value head, and the state at the start of the next block.

        The forward kernel's panels are made without beta, which gives -M in place of -A. `kept` are
        the rows of U that it kept, if it did. They serve as those of E, times `per_beta`.
        """
        size, KP, VP = itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V])
        row = W * size
        load_beta(REAL, desc, b, t, n, hv, beta)
        fill_row(REAL, REAL(1), per_beta)
        if kept and _can_divide(REAL, n, beta):
            reciprocal(REAL, beta, per_beta)
        else:
            kept = 0
        fill_row(REAL, REAL(1), m.beta)
        if PER_CHANNEL:
            channel_gates(REAL, desc, m, b, t, n, hv)
            if n < W:
                _clear_pairs(REAL, n, m.a)
                _clear_pairs(REAL, n, m.p)
            # k e^(G_last - G) as columns, and no other factors
            for c in range(0, KP, W):
                transpose_tile(REAL, m.updates + c * row, row)
            fill_row(REAL, REAL(1), m.gates + SUFFIX * row)
            fill_row(REAL, REAL(1), m.gates + DECAY * row)
        else:
            head_gates(REAL, desc, m, b, t, n, hv)
        updates = m.updates if PER_CHANNEL else m.keys
        v = array_at(desc, VALUE)
        v_rows, v_step = m.v, 0
        if not kept:
            v_rows, v_step = token_rows(REAL, v, b, t, n, hv, desc[V], m.v)
        for s in range(VP // W):
            strip = state + s * w.strip_step
            u = strip + KP * row
            if kept:
                spread_rows(REAL, kept + s * n * row, n, m.gates, u)
            else:
                for first in range(0, W, rows_of_tile(REAL)):
                    solve_errors(
                        REAL, m.keys, m.a, strip, u, KP, first, m.gates, v_rows + s * row, v_step,
                        beta,
                    )  # fmt: skip
            if has_next:
                for c in range(0, KP, W):
                    advance(
                        REAL, updates + c * row, strip + c * row, u + SUFFIX_ROWS * row,
                        m.decay + c * size, strip + w.state_step + c * row,
                    )  # fmt: skip

    return forward_block

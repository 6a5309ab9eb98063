"""U of every block of tokens, which the forward pass keeps for the backward pass.

The rows of a value head are together, so that threads begin new pages of memory apart, those of a
block strip after strip.
"""

from nbdelta.cpu._call import KEPT_ROWS, B, T, V
from nbdelta.cpu._jit import njit
from nbdelta.cpu._simd import itemsize, padded, tile
from nbdelta.cpu._vector_unit import W


def room_for_rows(tokens, K, V, dtype):
    """Return how many states take as much memory as the rows of that many tokens.

    None are kept where the forward pass may round U to bfloat16.
    """
    padded_V = -(-V // W) * W
    return 0 if dtype == "bfloat16" else -(-tokens * padded_V // (K * V or 1))


@njit()
def kept_rows(REAL, desc, b, t, hv):
    """Address of the rows of a block and value head, 0 if none are kept."""
    if not desc[KEPT_ROWS]:
        return 0
    rows = (hv * desc[B] + b) * desc[T] + t
    return desc[KEPT_ROWS] + rows * padded(REAL, desc[V]) * itemsize(REAL)


@tile
def keep_rows(e, rows, n, out):
    """Write n rows of 16 numbers, one behind the other."""

    def body(offset, carried):
        e.store(e.load(rows + offset), out + offset)
        return carried

    e.loop(n * e.row, [], body, e.row)

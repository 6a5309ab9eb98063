"""Tile of the triangular solves."""

from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import fma_panel


@tile
def solve(e, panel, strip, n, first, b, b_step, inverse):
    """Rows first.. of x = D^-1 b - (D^-1 L) x, stored behind the n rows of the strip.

    The panel holds -D^-1 L column by column: earlier rows of x are part of the loop, the triangle
    of this tile is solved in registers.
    """
    b, panel = b + first * b_step, panel + first * e.size
    acc = [
        e.load(b + b_step * i) * e.bcast(inverse + first * e.size, i * e.size) for i in range(e.mr)
    ]
    n = n + first
    acc = fma_panel(e, acc, panel, strip, n, maybe_empty=True)
    triangle, x = panel + n * e.row, strip + n * e.row
    for j in range(e.mr):
        e.store(acc[j], x, j * e.row)
        for i in range(j + 1, e.mr):
            acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), acc[j], acc[i])

"""Tiles of the triangular solves."""

from nbdelta.cpu._simd import tile


@tile
def invert(e, diagonal, inverse, negative):
    """1 / D and -1 / D of 16 numbers."""
    x = 1.0 / e.load(diagonal)
    e.store(x, inverse)
    e.store(x * -1.0, negative)


@tile
def solve(e, panel, x, n, first, b, b_step, inverse, out, out_step):
    """Rows first.. of x = D^-1 b - (D^-1 L) x, behind the n rows of `x` that are known, and to
    `out`.

    The panel holds -D^-1 L column by column: rows that are known are a product, and the triangle of
    this tile is solved in registers.
    """
    rows = range(e.mr)
    panel, inverse = panel + first * e.size, inverse + first * e.size
    b, out = b + first * b_step, out + first * out_step
    acc = [e.load(b + b_step * i) * e.bcast(inverse, i * e.size) for i in rows]

    def body(offset, acc):
        for u in rows:
            known, column = e.load(x + offset, u * e.row), panel + offset
            acc = [e.fma(e.bcast(column, u * e.row + i * e.size), known, acc[i]) for i in rows]
        return acc

    done = (n + first) * e.row
    acc = e.loop(done, acc, body, e.mr * e.row, maybe_empty=True)
    for j in rows:
        e.store(acc[j], x + done, j * e.row)
        e.store(acc[j], out + out_step * j)
        for i in range(j + 1, e.mr):
            factor = e.bcast(panel + done, j * e.row + i * e.size)
            acc[i] = e.fma(factor, acc[j], acc[i])

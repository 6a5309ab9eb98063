"""Tiles of the triangular solves."""

from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._vector_unit import W, tile_rows


@tile
def invert(e, diagonal, inverse, negative):
    """1 / D and -1 / D of 16 numbers."""
    x = 1.0 / e.load(diagonal)
    e.store(x, inverse)
    e.store(x * -1.0, negative)


@tile
def scale_rows(e, x, x_step, n, factors, squares):
    """16 rows of n numbers, each times its factor, as squares of 16 x 16 one behind the other."""

    def row(_, carried):
        x, factors, squares = carried
        factor = e.bcast(factors)

        def part(offset, _):
            e.store(e.load(x + offset) * factor, squares + offset * W)
            return []

        e.loop(n * e.size, [], part, e.row)
        return [x + x_step, factors + e.size, squares + e.row]

    e.loop(W, [x, factors, squares], row)


@cache
def solve(side):
    """Make the tile for `side` strips of x, which lie `x_step` bytes apart."""

    @tile
    def solve(e, squares, x, x_step, n, b, b_step, inverse, out, out_step):
        """16 rows of x = D^-1 b - (D^-1 L) x, behind the n rows of `x` that are known, and to
        `out`, which may be `b`.

        The squares hold the rows of -D^-1 L. Earlier rows of x are a product, the triangle of a
        register tile is solved in it.
        """
        mr, strips = tile_rows(e.size, side), range(side)
        xs = [x + x_step * s for s in strips]

        def add(acc, rows, xs, columns):
            """Add the products of some columns of a square with as many rows of x."""
            for u in columns:
                known = [e.load(x, u * e.row) for x in xs]
                for i in range(mr):
                    factor = e.bcast(rows, i * e.row + u * e.size)
                    acc[i] = [e.fma(factor, *xy) for xy in zip(known, acc[i])]
            return acc

        def by_rows(vectors):
            return [vectors[i : i + side] for i in range(0, mr * side, side)]

        done = n * e.row
        for first in range(0, W, mr):
            rows, acc = squares + first * e.row, []
            for i in range(first, first + mr):
                factor = e.bcast(inverse, i * e.size)
                acc += [e.load(b + b_step * i, s * e.row) * factor for s in strips]

            def body(offset, acc, rows=rows):
                acc = add(by_rows(acc), rows + offset, [x + offset for x in xs], range(W))
                return [vector for row in acc for vector in row]

            acc = by_rows(e.loop(done, acc, body, W * e.row, maybe_empty=True))
            rows, own = rows + done, [x + done for x in xs]
            acc = add(acc, rows, own, range(first))
            for j in range(mr):
                for s, vector in enumerate(acc[j]):
                    e.store(vector, own[s], (first + j) * e.row)
                    e.store(vector, out + out_step * (first + j), s * e.row)
                for i in range(j + 1, mr):
                    factor = e.bcast(rows, i * e.row + (first + j) * e.size)
                    acc[i] = [e.fma(factor, *xy) for xy in zip(acc[j], acc[i])]

    return solve

"""Tiles of the cumulative sums: steps of wide rows, steps of 16 lanes, 16 steps of 16 lanes."""

from nbdelta.cpu._simd import tile
from nbdelta.cpu._vector_unit import W


@tile
def add_row(e, x, ahead, totals, scale, out, n):
    """Add n numbers, a multiple of 16, to their running totals; out = totals * scale.

    The row `ahead` bytes further is brought into the cache.
    """
    factor = e.splat(scale)

    def body(offset, carried):
        e.prefetch(x + ahead + offset)
        total = e.load(totals + offset) + e.load(x + offset)
        e.store(total, totals + offset)
        e.store(total * factor, out + offset)
        return carried

    e.loop(n * e.size, [], body, e.row)


@tile
def add_steps(e, x, x_step, totals, scale, out, out_step, n):
    """Add n rows of 16 numbers to running totals that stay in registers; out = totals * scale."""
    factor = e.splat(scale)

    def body(_, carried):
        source, target, total = carried
        total = total + e.load(source)
        e.store(total * factor, target)
        return [source + x_step, target + out_step, total]

    e.store(e.loop(n, [x, out, e.load(totals)], body)[-1], totals)


def _add_square(reverse):
    @tile
    def add_square(e, x, x_step, ahead, ahead_step, totals, scale, out, out_step):
        """Running totals along 16 rows of 16 numbers; out = totals * scale.

        Transposed in registers, so that a row is a lane and every total is summed in the order of
        the steps. 16 rows of 16 numbers at `ahead` are brought into the cache.
        """
        factor = e.splat(scale, e.lanes)
        for row in range(0, W, e.lanes):
            at = [x + x_step * (row + i) for i in range(e.lanes)]
            to = [out + out_step * (row + i) for i in range(e.lanes)]
            for i in range(row, row + e.lanes):
                for line in range(0, e.row, 64):
                    e.prefetch(ahead + ahead_step * i + line)
            total = e.load(totals, row * e.size, e.lanes)
            starts = range(0, W, e.lanes)
            for start in reversed(starts) if reverse else starts:
                steps = e.load_transposed(at, start * e.size)
                sums = [None] * e.lanes
                for i in reversed(range(e.lanes)) if reverse else range(e.lanes):
                    total = total + steps[i]
                    sums[i] = total * factor
                for a, y in zip(to, e.transpose(sums)):
                    e.store(y, a, start * e.size)
            e.store(total, totals, row * e.size)

    return add_square


add_square, add_square_reversed = _add_square(False), _add_square(True)


@tile
def stream_rows(e, x, out, n):
    """Write n rows of 16 numbers past the caches, from a multiple of 64 bytes on."""

    def body(offset, carried):
        e.store(e.load(x + offset), out + offset, streaming=True)
        return carried

    e.loop(n * e.row, [], body, e.row)

"""Tiles of the gates, a row of lanes at a time."""

from nbdelta.cpu._simd import tile


def _gate_row(activation):
    @tile
    def gate_row(e, x, ahead, bias, factor, bound, out, n):
        """Gates of n lanes, a multiple of 16, each with its bias and factor.

        The row `ahead` bytes further is brought into the cache.
        """

        def body(offset, carried):
            e.prefetch(x + ahead + offset)
            value = e.load(x + offset) + e.load(bias + offset)
            e.store(activation(e, value, e.load(factor + offset), bound), out + offset)
            return carried

        e.loop(n * e.size, [], body, e.row)

    return gate_row


softplus_row = _gate_row(lambda e, x, factor, _: e.softplus(x) * (factor * -1.0))
bounded_row = _gate_row(lambda e, x, factor, bound: e.sigmoid(x * factor) * e.splat(bound))

"""How arrays are cut for cumulative sums: chunks along an axis, blocks of neighbouring lanes."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nbdelta.cpu._vector_unit import W

# most lanes that are added up side by side: their totals and a staged row stay in the first cache
ROW = 2048


def chunk_bounds(length, chunk_size, cu_seqlens=None):
    """First and end token of every chunk, ``[NT, 2]``; chunks start anew with each sequence."""
    ends = np.array([0, length]) if cu_seqlens is None else cu_seqlens
    starts = [np.arange(bos, eos, chunk_size) for bos, eos in pairwise(ends)]
    stops = [np.minimum(first + chunk_size, eos) for first, eos in zip(starts, ends[1:])]
    empty = np.zeros(0, np.int64)
    bounds = np.stack([np.concatenate([empty, *starts]), np.concatenate([empty, *stops])], axis=1)
    return np.ascontiguousarray(bounds, np.int64)


def offsets(shape, strides):
    """Byte offset of every index, in C order."""
    result = np.zeros(1, np.int64)
    for size, stride in zip(shape, strides):
        result = (result[:, None] + np.arange(size) * stride).ravel()
    return result


class _Axis(NamedTuple):
    """Size and byte strides, in x and in the result."""

    size: int
    x: int
    out: int

    @property
    def distance(self):
        return abs(self.x) + abs(self.out)


def _merge(axes):
    """Make one axis of two wherever one goes on where the other ends; from far to near."""
    merged = []
    for axis in sorted(axes, key=lambda a: -a.distance):
        if axis.size == 1:
            continue
        if merged and merged[-1][1:] == (axis.size * axis.x, axis.size * axis.out):
            axis = axis._replace(size=merged.pop().size * axis.size)
        merged.append(axis)
    return merged


def _table(places, length, axes, lanes):
    """Table of the blocks over all `axes`, from places along the axis of the sums."""
    table = np.empty((len(places), 4), np.int64)
    table[:, :2], table[:, 2], table[:, 3] = places, length, lanes
    for axis in axes:
        steps = np.arange(axis.size)[:, None] * (axis.x, axis.out, 0, 0)
        table = (table[:, None] + steps).reshape(-1, 4)
    return table


def cut(shape, strides, out_strides, chunk_size, axis, cu_seqlens):
    """Cut arrays into blocks: their table; axes of the sums, the lanes, and pieces of lanes."""
    axes = [_Axis(*a) for a in zip(shape, strides, out_strides)]
    step = axes.pop(axis)
    if cu_seqlens is None:
        whole, rest = divmod(step.size, chunk_size)
        # the chunks are one more axis, and a shorter one at the end is apart
        chunks = _merge([*axes, _Axis(whole, chunk_size * step.x, chunk_size * step.out)])
        parts = [(chunks, [0], chunk_size)] if whole else []
        if rest:
            parts.append((_merge(axes), [whole * chunk_size], rest))
    else:
        bounds = chunk_bounds(step.size, chunk_size, cu_seqlens)
        parts = [(_merge(axes), bounds[:, 0], bounds[:, 1] - bounds[:, 0])]

    one = _Axis(1, 0, 0)
    common = parts[0][0]
    lane, piece = min(common, key=lambda a: a.distance, default=one), one
    if step.distance <= lane.distance:
        # 16 lanes are transposed: better whole tiles of them than near ones
        lane = max(common, key=lambda a: (min(a.size, W), -a.distance), default=one)
    elif lane.size % W == 0 and lane.size < ROW:
        # lanes of x in pieces with gaps between them, such as a slice of the head dimension
        for a in set(common) & set(parts[-1][0]):
            if a.out == lane.size * lane.out and a.distance < step.distance:
                piece = a
    tables = []
    for axes, first, steps in parts:
        places = np.array(first)[:, None] * (step.x, step.out)
        others = [a for a in axes if a not in (lane, piece)]
        lanes = (lane.size if lane in axes else 1) * piece.size
        tables.append(_table(places, steps, others, lanes))
    return np.concatenate(tables), step, lane, piece

"""The state of a value head in the registers of a block: some columns of V and all of K.

The functions here and in ``_step.py`` are unrolled over the numbers that a thread holds, which
never see memory between the one load and the one store.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import intrinsic
from nbdelta.cuda._memory import (
    ITEMSIZE,
    load_numbers,
    reader,
    store_numbers,
    writer,
)
from nbdelta.cuda._ptx import F32, F64, I64

THREADS, WARP = 128, 32
# of every sum over the rows
PARTS = 4


class Form(NamedTuple):
    """Which numbers of the state each thread of the block holds.

    `vector` neighbours along K or V are 16 bytes, and `lanes` threads side by side hold
    neighbouring vectors. The rows of a thread are ``first_row + row_steps``, its columns
    ``first_column + column_steps``.

    In all forms for a dtype a sum over the rows is taken in one order: rows that are alike modulo
    some number one after the other; the sums of neighbouring ones in pairs, as far as they belong
    to one of four parts; and then the parts. So the layout of a state does not show in the results.
    """

    columns: int  # of the block
    along_k: bool
    vector: int
    lanes: int
    row_steps: tuple[int, ...]
    column_steps: tuple[int, ...]
    rows: int  # of all threads together
    row_lanes: tuple[int, ...]  # bits of a lane's number that tell rows of one part apart

    @property
    def count(self):
        """Numbers of a thread."""
        return len(self.row_steps) * len(self.column_steps)

    def accesses(self, vectors):
        """Row step, column step and the places in the thread's tuple, for every access."""
        width = len(self.column_steps)
        size = self.vector if vectors else 1
        for i in range(0, len(self.row_steps), size if self.along_k else 1):
            for j in range(0, width, 1 if self.along_k else size):
                step = width if self.along_k else 1
                places = range(i * width + j, i * width + j + size * step, step)
                yield self.row_steps[i], self.column_steps[j], places


@cache
def form_of(K, dtype, along_k):
    """Form for states of a dtype whose contiguous axis is K, or V."""
    size = ITEMSIZE[dtype]
    columns, vector = (16 if size == 8 else 32), 16 // size
    classes = THREADS * vector // columns
    if along_k:
        lanes = classes // vector
        row_steps = [i + j for i in range(0, K, classes) for j in range(vector)]
        column_steps = range(0, columns, THREADS // lanes)
        row_lanes = [b for b in (1, 2) if b < lanes // PARTS]
    else:
        lanes = columns // vector
        row_steps, column_steps = range(0, K, classes), range(vector)
        row_lanes = [b for b in (1, 2, 4, 8, 16) if b >= lanes]
    return Form(
        columns=columns,
        along_k=along_k,
        vector=vector,
        lanes=lanes,
        row_steps=tuple(row_steps),
        column_steps=tuple(column_steps),
        rows=-(-K // classes) * classes,
        row_lanes=tuple(row_lanes),
    )


def numpy_type(REAL):
    return np.float64 if REAL == types.float64 else np.float32


def llvm_type(REAL):
    return F64 if REAL == types.float64 else F32


@cache
def zeros(form, REAL):
    """A function: the state before the first token where none is given."""

    @intrinsic(lambda: (numpy_type(REAL)(0),) * form.count)
    def zeros(typingctx):
        def codegen(context, builder, signature, args):
            zero = ir.Constant(llvm_type(REAL), 0.0)
            return context.make_tuple(builder, signature.return_type, [zero] * form.count)

        return types.UniTuple(REAL, form.count)(), codegen

    return zeros


@cache
def loader(form, REAL, dtype, vectors, masked):
    """A function ``(address, row stride, column stride, first row, first column, K, V)``.

    `vectors`: 16 bytes at once. `masked`: there may be rows or columns past the end.
    """
    size = form.vector if vectors else 1
    read = reader(dtype, REAL, size)
    accesses = list(form.accesses(vectors))

    def simulated(address, row_stride, column_stride, row, column, K, V):
        row, column = int(row), int(column)
        state = [numpy_type(REAL)(0)] * form.count
        for i, j, places in accesses:
            if row + i < K and column + j < V:
                x = read(address + (row + i) * row_stride + (column + j) * column_stride)
                for place, number in zip(places, x if size > 1 else [x]):
                    state[place] = number
        return tuple(state)

    @intrinsic(simulated)
    def load(typingctx, address, row_stride, column_stride, row, column, K, V):
        def codegen(context, builder, signature, args):
            state = [None] * form.count
            for at, inside, places in _places(builder, args, accesses, masked):
                if masked:  # a load that is not wanted reads the first number instead
                    at = builder.select(inside, at, args[0])
                numbers = load_numbers(builder, at, dtype, REAL, size)
                for place, x in zip(places, numbers):
                    zero = ir.Constant(x.type, 0.0)
                    state[place] = builder.select(inside, x, zero) if masked else x
            return context.make_tuple(builder, signature.return_type, state)

        return types.UniTuple(REAL, form.count)(*[types.int64] * 7), codegen

    return load


@cache
def storer(form, REAL, dtype, vectors, masked):
    """A function like that of `loader`, with the state before the other arguments."""
    size = form.vector if vectors else 1
    write = writer(dtype, REAL, size)
    accesses = list(form.accesses(vectors))

    def simulated(state, address, row_stride, column_stride, row, column, K, V):
        row, column = int(row), int(column)
        for i, j, places in accesses:
            if row + i < K and column + j < V:
                x = [state[place] for place in places]
                at = address + (row + i) * row_stride + (column + j) * column_stride
                write(at, x if size > 1 else x[0])

    @intrinsic(simulated)
    def store(typingctx, state, address, row_stride, column_stride, row, column, K, V):
        def codegen(context, builder, signature, args):
            state, *args = args
            for at, inside, places in _places(builder, args, accesses, masked):
                numbers = [builder.extract_value(state, place) for place in places]
                if masked:
                    with builder.if_then(inside):
                        store_numbers(builder, at, numbers, dtype)
                else:
                    store_numbers(builder, at, numbers, dtype)
            return context.get_dummy_value()

        return types.void(types.UniTuple(REAL, form.count), *[types.int64] * 7), codegen

    return store


def _places(builder, args, accesses, masked):
    """Address, whether it is inside, and places in the tuple, for every access."""
    address, row_stride, column_stride, row, column, K, V = args
    address = builder.add(address, builder.mul(row, row_stride))
    address = builder.add(address, builder.mul(column, column_stride))
    strides = {}  # from one access to the next: (rows, columns)
    last = 0, 0
    for i, j, places in accesses:
        step = i - last[0], j - last[1]
        if step not in strides:
            down, right = (ir.Constant(I64, x) for x in step)
            strides[step] = builder.add(
                builder.mul(down, row_stride), builder.mul(right, column_stride)
            )
        last = i, j
        address = builder.add(address, strides[step])
        inside = None
        if masked:
            in_k = builder.icmp_signed("<", builder.add(row, ir.Constant(I64, i)), K)
            in_v = builder.icmp_signed("<", builder.add(column, ir.Constant(I64, j)), V)
            inside = builder.and_(in_k, in_v)
        yield address, inside, places

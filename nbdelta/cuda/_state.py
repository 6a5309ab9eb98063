"""The state of a value head in the registers of a block: some columns of V and all of K.

The functions here are unrolled over the numbers that a thread holds, which never see memory between
the one load and the one store. What a token does to a row of the state is a record of four numbers
in shared memory: e^g k, e^g q, k, e^g.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import intrinsic
from nbdelta.cuda._memory import ITEMSIZE, load_numbers, reader, store_numbers, writer
from nbdelta.cuda._ptx import F32, F64, I32, I64, simulated_exchange, warp_shuffle_xor

THREADS, WARP = 128, 32
RECORD = 4
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


@cache
def zeros(form, REAL):
    """A function: the state before the first token where none is given."""

    @intrinsic(lambda: (_numpy(REAL)(0),) * form.count)
    def zeros(typingctx):
        def codegen(context, builder, signature, args):
            zero = ir.Constant(_llvm(REAL), 0.0)
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
        state = [_numpy(REAL)(0)] * form.count
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


# -- records: four numbers for each row; in the order in which threads read them without conflicts


@cache
def keep_record(form, REAL):
    """A function ``(records, half, row, record)``: writes the record of a row."""

    def simulated(records, half, row, record):
        records[_record_places(form, half, row)] = record

    @intrinsic(simulated)
    def keep(typingctx, records, half, row, record):
        def codegen(context, builder, signature, args):
            records, half, row, record = args
            data = _data_of(context, builder, signature.args[0], records)
            numbers = [builder.extract_value(record, i) for i in range(RECORD)]
            if form.along_k:
                for i, x in enumerate(numbers):
                    place = builder.add(half, ir.Constant(I32, i * form.rows))
                    builder.store(x, builder.gep(data, [builder.add(place, row)]))
            else:
                place = builder.add(half, builder.mul(row, ir.Constant(I32, RECORD)))
                for i in range(0, RECORD, 16 // _size(REAL)):
                    at = builder.gep(data, [builder.add(place, ir.Constant(I32, i))])
                    _store_vector(builder, at, numbers[i : i + 16 // _size(REAL)])
            return context.get_dummy_value()

        return types.void(records, types.int32, types.int32, types.UniTuple(REAL, RECORD)), codegen

    return keep


def _record_places(form, half, row):
    if form.along_k:
        return [half + i * form.rows + row for i in range(RECORD)]
    return [half + RECORD * row + i for i in range(RECORD)]


def _records(form, builder, data, half, row, first):
    """Two numbers, from the first on, of the record of every row of a thread."""
    if not form.along_k:
        place = builder.add(half, builder.mul(row, ir.Constant(I32, RECORD)))
        for step in form.row_steps:
            at = builder.add(place, ir.Constant(I32, RECORD * step + first))
            yield _load_vector(builder, builder.gep(data, [at]), 2)
        return
    size = min(form.vector, 16 // _size_of(data))
    for i in range(0, len(form.row_steps), size):
        columns = []
        for part in (first, first + 1):
            at = ir.Constant(I32, part * form.rows + form.row_steps[i])
            at = builder.gep(data, [builder.add(builder.add(half, row), at)])
            columns.append(_load_vector(builder, at, size))
        yield from zip(*columns)


# -- the products with a token's k and q, and the step


@cache
def dots(form, REAL):
    """A function ``(state, records, half, row, sums, part, column, lane)``.

    Multiplies every column of the state with e^g k and e^g q, and writes the sums over the rows of
    this part into ``sums [2, parts, columns]``.
    """
    width = len(form.column_steps)
    # classes of rows that a thread has, in turn
    classes = form.vector if form.along_k else 1

    def simulated(state, records, half, row, sums, part, column, lane):
        x = np.array(state).reshape(len(form.row_steps), width)
        result = np.zeros((classes, 2, width), _numpy(REAL))
        for i, (step, numbers) in enumerate(zip(form.row_steps, x)):
            weights = records[_record_places(form, half, row + step)[:2]]
            result[i % classes] += weights[:, None] * numbers
        while len(result) > 1:
            result = result[::2] + result[1::2]
        result = _simulated_sum(result[0], form.row_lanes)
        for which in range(2):
            for step, x in zip(form.column_steps, result[which]):
                sums[(which * PARTS + part) * form.columns + column + step] = x

    @intrinsic(simulated)
    def dots(typingctx, state, records, half, row, sums, part, column, lane):
        def codegen(context, builder, signature, args):
            state, records, half, row, sums, part, column, lane = args
            data = _data_of(context, builder, signature.args[1], records)
            zero = ir.Constant(_llvm(REAL), 0.0)
            sums_of = [[zero] * (2 * width) for _ in range(classes)]
            for i, weights in enumerate(_records(form, builder, data, half, row, 0)):
                result = sums_of[i % classes]
                for j in range(width):
                    x = builder.extract_value(state, i * width + j)
                    for which in range(2):
                        place = which * width + j
                        result[place] = builder.fma(weights[which], x, result[place])
            while len(sums_of) > 1:
                pairs = zip(sums_of[::2], sums_of[1::2])
                sums_of = [[builder.fadd(x, y) for x, y in zip(*pair)] for pair in pairs]
            (result,) = sums_of
            place = builder.add(builder.mul(part, ir.Constant(I32, form.columns)), column)
            places = [
                ir.Constant(I32, which * PARTS * form.columns + step)
                for which in range(2)
                for step in form.column_steps
            ]
            result, places = _scattered_sum(builder, lane, result, places, form.row_lanes)
            data = _data_of(context, builder, signature.args[4], sums)
            for x, i in zip(result, places):
                builder.store(x, builder.gep(data, [builder.add(place, i)]))
            return context.get_dummy_value()

        i32 = types.int32
        state = types.UniTuple(REAL, form.count)
        return types.void(state, records, i32, i32, sums, i32, i32, i32), codegen

    return dots


def _scattered_sum(builder, lane, numbers, places, bits):
    """Sums over the lanes whose numbers differ in these bits, shared out among them.

    Each step adds one half of the numbers in one lane and the other half in its partner. Returns
    those that this lane is left with, and their places; a single number is in all lanes.
    """
    for bit in bits:
        if len(numbers) == 1:
            other = warp_shuffle_xor(builder, numbers[0], bit)
            numbers = [builder.fadd(numbers[0], other)]
            continue
        high = builder.icmp_signed(
            "!=", builder.and_(lane, ir.Constant(I32, bit)), ir.Constant(I32, 0)
        )
        half = len(numbers) // 2

        def kept(pairs, high=high):
            return [builder.select(high, b, a) for a, b in pairs]

        sent = kept(zip(numbers[half:], numbers[:half]))
        own = kept(zip(numbers[:half], numbers[half:]))
        places = kept(zip(places[:half], places[half:]))
        received = [warp_shuffle_xor(builder, x, bit) for x in sent]
        numbers = [builder.fadd(x, y) for x, y in zip(own, received)]
    return numbers, places


@cache
def update(form, REAL):
    """A function ``(state, records, half, row, d, column)``: e^g S + k d^T."""
    columns = form.column_steps
    width = len(columns)

    def simulated(state, records, half, row, d, column):
        x = np.array(state).reshape(len(form.row_steps), width)
        d = np.array([d[column + j] for j in columns])
        record = [records[_record_places(form, half, row + i)[2:]] for i in form.row_steps]
        return tuple(np.stack([w * s + k * d for s, (k, w) in zip(x, record)]).ravel())

    @intrinsic(simulated)
    def update(typingctx, state, records, half, row, d, column):
        def codegen(context, builder, signature, args):
            state, records, half, row, d, column = args
            data = _data_of(context, builder, signature.args[1], records)
            deltas = _data_of(context, builder, signature.args[4], d)
            at = [builder.add(column, ir.Constant(I32, j)) for j in columns]
            deltas = [builder.load(builder.gep(deltas, [i])) for i in at]
            out = []
            for i, (k, w) in enumerate(_records(form, builder, data, half, row, 2)):
                for j in range(width):
                    x = builder.extract_value(state, i * width + j)
                    out.append(builder.fma(k, deltas[j], builder.fmul(w, x)))
            return context.make_tuple(builder, signature.return_type, out)

        state = types.UniTuple(REAL, form.count)
        return state(state, records, types.int32, types.int32, d, types.int32), codegen

    return update


@cache
def warp_sum(REAL, n):
    """A function of n numbers: the sum of each over the warp."""
    bits = (16, 8, 4, 2, 1)

    @intrinsic(lambda numbers: tuple(_simulated_sum(np.array(numbers), bits)))
    def warp_sum(typingctx, numbers):
        def codegen(context, builder, signature, args):
            sums = [builder.extract_value(args[0], i) for i in range(n)]
            sums = _emitted_sum(builder, sums, bits)
            return context.make_tuple(builder, signature.return_type, sums)

        return types.UniTuple(REAL, n)(types.UniTuple(REAL, n)), codegen

    return warp_sum


def _simulated_sum(numbers, bits):
    lanes, lane = simulated_exchange(numbers)
    for bit in bits:
        lanes = [x + lanes[i ^ bit] for i, x in enumerate(lanes)]
    return lanes[lane]


def _emitted_sum(builder, numbers, bits):
    """Sums over the lanes whose numbers differ in these bits, in every one of them."""
    for bit in bits:
        others = [warp_shuffle_xor(builder, x, bit) for x in numbers]
        numbers = [builder.fadd(x, y) for x, y in zip(numbers, others)]
    return numbers


def _numpy(REAL):
    return np.float64 if REAL == types.float64 else np.float32


def _llvm(REAL):
    return F64 if REAL == types.float64 else F32


def _data_of(context, builder, array_type, array):
    """Pointer to the first number of an array."""
    from numba.cuda.np.arrayobj import make_array

    return make_array(array_type)(context, builder, array).data


def _size(REAL):
    return 8 if REAL == types.float64 else 4


def _size_of(pointer):
    return 8 if pointer.type.pointee == F64 else 4


def _load_vector(builder, pointer, n):
    """Load neighbouring numbers, in accesses of at most 16 bytes."""
    number, size = pointer.type.pointee, _size_of(pointer)
    pointer = builder.bitcast(pointer, ir.VectorType(number, n).as_pointer())
    x = builder.load(pointer, align=min(n * size, 16))
    return [builder.extract_element(x, ir.Constant(I32, i)) for i in range(n)]


def _store_vector(builder, pointer, numbers):
    kind = ir.VectorType(numbers[0].type, len(numbers))
    x = ir.Constant(kind, ir.Undefined)
    for i, number in enumerate(numbers):
        x = builder.insert_element(x, number, ir.Constant(I32, i))
    builder.store(x, builder.bitcast(pointer, kind.as_pointer()), align=16)

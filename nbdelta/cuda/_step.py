"""What a token does to the state of a value head that lies in the registers of a block.

It is a record of four numbers for each row, in shared memory: e^g k, e^g q, k, e^g. The records
lie in the order in which threads read them without conflicts.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import intrinsic
from nbdelta.cuda._ptx import F64, I32, simulated_exchange, warp_shuffle_xor
from nbdelta.cuda._state import PARTS, llvm_type, numpy_type

RECORD = 4  # numbers


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
        result = np.zeros((classes, 2, width), numpy_type(REAL))
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
            zero = ir.Constant(llvm_type(REAL), 0.0)
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

"""Numbers at addresses, in whichever dtype they lie there; the descriptor's fields.

A kernel computes in float32, or in float64 for float64 inputs, and its arrays come in any of four
dtypes. `reader` and `writer` make functions for a dtype known when the kernel is compiled;
`read_real` and `read_index` look at the dtype code when they run.
"""

import ctypes
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import device, intrinsic
from nbdelta.cuda._ptx import F32, F64, I16, I32, I64, Ptx, round_pair, round_to_bfloat16

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64")
FLOAT32, FLOAT64, FLOAT16, BFLOAT16, INT32, INT64 = range(6)
ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}

_STORED = {"float32": F32, "float64": F64, "float16": ir.HalfType(), "bfloat16": I16}
_STORED.update(int32=I32, int64=I64)


def real_of(dtype):
    """The dtype that kernels compute in for inputs of a dtype."""
    return types.float64 if dtype == "float64" else types.float32


@cache
def fields(n):
    """A function ``(desc, i)`` of a constant i: the n fields of the descriptor from i on."""

    @intrinsic(lambda desc, i: desc[i : i + n])
    def read(typingctx, desc, i):
        def codegen(context, builder, signature, args):
            first = signature.args[1].literal_value
            values = [builder.extract_value(args[0], first + j) for j in range(n)]
            return context.make_tuple(builder, signature.return_type, values)

        if not isinstance(i, types.IntegerLiteral):
            return None
        return types.UniTuple(types.int64, n)(desc, i), codegen

    return read


def _simulated_real(bits):
    return np.int64(bits).astype(np.int32).view(np.float32)


@intrinsic(_simulated_real)
def _float32_of(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic(lambda bits: np.int64(bits).view(np.float64))
def _float64_of(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], F64)

    return types.float64(types.int64), codegen


def real_field(REAL):
    """The function that makes a number of the bits in a field of the descriptor."""
    return _float64_of if REAL == types.float64 else _float32_of


# -- what the simulator does


def _simulated_read(dtype, REAL, n):
    size = ITEMSIZE[dtype]

    def read(address):
        raw = ctypes.string_at(int(address), n * size)
        if dtype == "bfloat16":
            x = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            x = np.frombuffer(raw, dtype)
        x = x.astype(str(REAL))
        return x[0] if n == 1 else tuple(x)

    return read


def _simulated_write(dtype, n):
    def write(address, values):
        x = np.array(values).reshape(n)
        if dtype == "bfloat16":
            import ml_dtypes

            x = x.astype(ml_dtypes.bfloat16)
        with np.errstate(over="ignore"):
            raw = x.astype(dtype if dtype != "bfloat16" else x.dtype).tobytes()
        ctypes.memmove(int(address), raw, len(raw))

    return write


# -- what the device does


def _widen(builder, x, REAL):
    """A stored number as a number of the compute dtype, or as int64."""
    if isinstance(x.type, ir.IntType):
        return builder.sext(x, I64) if x.type.width < 64 else x
    wanted = F64 if REAL == types.float64 else F32
    if x.type == wanted:
        return x
    return builder.fptrunc(x, wanted) if x.type == F64 else builder.fpext(x, wanted)


def _halves(builder, word, dtype):
    """The two numbers of 16 bits in a word."""
    if dtype == "bfloat16":
        low = builder.shl(word, ir.Constant(I32, 16))
        high = builder.and_(word, ir.Constant(I32, 0xFFFF0000))
        return [builder.bitcast(x, F32) for x in (low, high)]
    words = (word, builder.lshr(word, ir.Constant(I32, 16)))
    return [builder.bitcast(builder.trunc(x, I16), _STORED[dtype]) for x in words]


def _access(builder, address, stored, n):
    """Pointer to n neighbours, and the alignment of one access to them."""
    kind = stored if n == 1 else ir.VectorType(stored, n)
    size = {F64: 8, I64: 8, F32: 4, I32: 4}.get(stored, 2)
    return builder.inttoptr(address, kind.as_pointer(1)), n * size


def _load(builder, address, stored, n):
    pointer, align = _access(builder, address, stored, n)
    x = builder.load(pointer, align=align)
    if n == 1:
        return [x]
    return [builder.extract_element(x, ir.Constant(I32, i)) for i in range(n)]


def _store(builder, address, numbers):
    pointer, align = _access(builder, address, numbers[0].type, len(numbers))
    x = numbers[0]
    if len(numbers) > 1:
        x = ir.Constant(pointer.type.pointee, ir.Undefined)
        for i, number in enumerate(numbers):
            x = builder.insert_element(x, number, ir.Constant(I32, i))
    builder.store(x, pointer, align=align)


def load_numbers(builder, address, dtype, REAL, n):
    """Emit one access to n neighbouring numbers; returns them in the compute dtype."""
    if ITEMSIZE[dtype] == 2 and n > 1:
        words = _load(builder, address, I32, n // 2)
        numbers = [x for word in words for x in _halves(builder, word, dtype)]
    elif dtype == "bfloat16":
        (x,) = _load(builder, address, I16, 1)
        numbers = _halves(builder, builder.zext(x, I32), dtype)[:1]
    else:
        numbers = _load(builder, address, _STORED[dtype], n)
    return [_widen(builder, x, REAL) for x in numbers]


def store_numbers(builder, address, numbers, dtype):
    """Emit one access that writes neighbouring numbers."""
    if ITEMSIZE[dtype] == 2:
        numbers = [builder.fptrunc(x, F32) if x.type == F64 else x for x in numbers]
        if len(numbers) > 1:
            pairs = zip(numbers[::2], numbers[1::2])
            numbers = [round_pair(builder, dtype, low, high) for low, high in pairs]
        elif dtype == "bfloat16":
            numbers = [round_to_bfloat16(builder, numbers[0])]
    stored = I32 if numbers[0].type == I32 else _STORED[dtype]
    if numbers[0].type != stored:
        change = builder.fpext if stored == F64 else builder.fptrunc
        numbers = [change(x, stored) for x in numbers]
    _store(builder, address, numbers)


@cache
def reader(dtype, REAL, n=1):
    """A function of an address: the number there, or a tuple of the n numbers from there on.

    Several numbers are one access, so their address is a multiple of their size in bytes, and that
    is at most 16.
    """

    @intrinsic(_simulated_read(dtype, REAL, n))
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            numbers = load_numbers(builder, args[0], dtype, REAL, n)
            if n == 1:
                return numbers[0]
            return context.make_tuple(builder, signature.return_type, numbers)

        result = REAL if n == 1 else types.UniTuple(REAL, n)
        return result(types.int64), codegen

    return read


@cache
def writer(dtype, REAL, n=1):
    """A function of an address and a number, or a tuple of n numbers: the reverse of `reader`."""

    @intrinsic(_simulated_write(dtype, n))
    def write(typingctx, address, value):
        def codegen(context, builder, signature, args):
            address, value = args
            numbers = [value] if n == 1 else [builder.extract_value(value, i) for i in range(n)]
            store_numbers(builder, address, numbers, dtype)
            return context.get_dummy_value()

        given = REAL if n == 1 else types.UniTuple(REAL, n)
        return types.void(types.int64, given), codegen

    return write


@cache
def write_real(REAL, wide=False):
    """A function of dtype code, address and a number: the reverse of `read_real`."""
    f32, f64, f16, bf16 = (writer(dtype, REAL) for dtype in DTYPES[:4])

    @device
    def write(code, address, value):
        if code == FLOAT32:
            f32(address, value)
        elif code == BFLOAT16:
            bf16(address, value)
        elif wide and code == FLOAT64:
            f64(address, value)
        else:
            f16(address, value)

    return write


_read_int32, _read_int64 = (reader(dtype, types.int64) for dtype in ("int32", "int64"))


@device
def read_index(code, address):
    """Number in an index array, as int64."""
    if code == INT32:
        return _read_int32(address)
    return _read_int64(address)


@cache
def read_real(REAL, wide=False):
    """A function of dtype code and address: the number there.

    `wide`: float64 may come, which a kernel that computes in float32 otherwise has no code for.
    """
    f32, f64, f16, bf16 = (reader(dtype, REAL) for dtype in DTYPES[:4])

    @device
    def read(code, address):
        if code == FLOAT32:
            return f32(address)
        if code == BFLOAT16:
            return bf16(address)
        if wide and code == FLOAT64:
            return f64(address)
        return f16(address)

    return read


@cache
def column_reader(dtype, REAL, n):
    """A function of address, byte stride and count: n numbers, those from `count` on are zero.

    All are under way at once, but for those that are not there: they are not looked at.
    """
    read = _simulated_read(dtype, REAL, 1)

    def simulated(address, stride, count):
        zero = np.dtype(str(REAL)).type(0)
        return tuple([read(address + i * stride) if i < count else zero for i in range(n)])

    @intrinsic(simulated)
    def column(typingctx, address, stride, count):
        def codegen(context, builder, signature, args):
            numbers = Ptx(builder).load_column(dtype, REAL, n, *args)
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.UniTuple(REAL, n)(types.int64, types.int64, types.int64), codegen

    return column


@cache
def block_writer(REAL, m, n):
    """A function of address, byte strides, counts of rows and columns, and m x n numbers.

    Numbers past the counts are not written.
    """
    write_one = _simulated_write(str(REAL), 1)

    def simulated(address, row_step, column_step, rows, columns, numbers):
        for i in range(min(m, rows)):
            for j in range(min(n, columns)):
                write_one(address + i * row_step + j * column_step, numbers[i * n + j])

    @intrinsic(simulated)
    def write(typingctx, address, row_step, column_step, rows, columns, numbers):
        def codegen(context, builder, signature, args):
            address, row_step, column_step, rows, columns, numbers = args
            for i in range(m):
                inside = builder.icmp_signed("<", ir.Constant(I64, i), rows)
                count = builder.select(inside, columns, ir.Constant(I64, 0))
                row = [builder.extract_value(numbers, i * n + j) for j in range(n)]
                Ptx(builder).store_column_if(address, column_step, count, row)
                address = builder.add(address, row_step)
            return context.get_dummy_value()

        given = types.UniTuple(REAL, m * n)
        return types.void(*[types.int64] * 5, given), codegen

    return write

"""Numbers in shared memory."""

from functools import cache

from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import intrinsic
from nbdelta.cuda._ptx import F64, I32


def _element_pointer(context, builder, signature, args):
    from numba.cuda.np.arrayobj import make_array

    data = make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic(lambda array, i: array[i])
def element(typingctx, array, i):
    """Number i of a shared array with one axis.

    ``array[i]`` would count from the end where i is negative, at a price in every inner loop.
    """

    def codegen(context, builder, signature, args):
        return builder.load(_element_pointer(context, builder, signature, args))

    return array.dtype(array, i), codegen


def _simulated_set_element(array, i, x):
    array[i] = x


@intrinsic(_simulated_set_element)
def set_element(typingctx, array, i, x):
    """The reverse of `element`."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _element_pointer(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(array, i, array.dtype), codegen


@cache
def shared_reader(REAL, starts, width=1):
    """A function of a shared array with one axis and a place: the numbers `starts` from there on.

    `width`: so many neighbours at each start lie at a multiple of 16 bytes or of their size.
    """
    count = width * len(starts)

    def simulated(array, place):
        return tuple([array[place + start + i] for start in starts for i in range(width)])

    @intrinsic(simulated)
    def read(typingctx, array, place):
        def codegen(context, builder, signature, args):
            pointer = _element_pointer(context, builder, signature, args)
            stored, numbers = pointer.type.pointee, []
            for start in starts:
                own = builder.gep(pointer, [ir.Constant(I32, start)])
                if width > 1:
                    own = builder.bitcast(own, ir.VectorType(stored, width).as_pointer())
                x = builder.load(own, align=min(16, width * (8 if stored == F64 else 4)))
                numbers += (
                    [builder.extract_element(x, ir.Constant(I32, i)) for i in range(width)]
                    if width > 1
                    else [x]
                )
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.UniTuple(REAL, count)(array, place), codegen

    return read


@cache
def shared_writer(REAL, starts):
    """A function of a shared array, a place and numbers: the reverse of `shared_reader`."""

    def simulated(array, place, numbers):
        for start, x in zip(starts, numbers):
            array[place + start] = x

    @intrinsic(simulated)
    def write(typingctx, array, place, numbers):
        def codegen(context, builder, signature, args):
            pointer = _element_pointer(context, builder, signature, args)
            for i, start in enumerate(starts):
                own = builder.gep(pointer, [ir.Constant(I32, start)])
                builder.store(builder.extract_value(args[2], i), own)
            return context.get_dummy_value()

        return types.void(array, place, types.UniTuple(REAL, len(starts))), codegen

    return write

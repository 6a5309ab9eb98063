"""What kernels read of their descriptor, and how they claim work."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nbdelta.cpu._llvm import F64, I64


def _entry(context, builder, signature, args):
    """Pointer to ``desc[index]``."""
    return builder.gep(args[0], [args[1]])


@intrinsic
def claim(typingctx, desc, index):
    """Add 1 to ``desc[index]`` as one step among all threads; return the value before."""

    def codegen(context, builder, signature, args):
        pointer = _entry(context, builder, signature, args)
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "seq_cst")

    return types.int64(desc, types.int64), codegen


@intrinsic
def read_array(typingctx, desc, index):
    """Return six entries of a descriptor from an index on: an array's address, code, strides."""

    def codegen(context, builder, signature, args):
        first = _entry(context, builder, signature, args)
        values = [builder.load(builder.gep(first, [ir.Constant(I64, i)])) for i in range(6)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, 6)(desc, types.int64), codegen


@intrinsic
def read_float(typingctx, desc, index):
    """Return the entry of a descriptor that holds the bits of a float64."""

    def codegen(context, builder, signature, args):
        pointer = _entry(context, builder, signature, args)
        return builder.load(builder.bitcast(pointer, F64.as_pointer()))

    return types.float64(desc, types.int64), codegen


@intrinsic
def finish_stores(typingctx):
    """Make what was written past the caches visible to other threads."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def read_int64(typingctx, address):
    """Return the int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()))

    return types.int64(types.int64), codegen

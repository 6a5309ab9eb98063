"""Words of memory that several threads read and write, calls by address, and the clock.

A word is ``pointer[index]`` of int64. All operations are sequentially consistent.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

I64 = ir.IntType(64)
WORDS = types.CPointer(types.int64)
ORDER = "seq_cst"


@intrinsic
def add(typingctx, pointer, index, n):
    """Add to a word; return what it was before."""

    def codegen(context, builder, signature, args):
        word = builder.gep(args[0], [args[1]])
        return builder.atomic_rmw("add", word, args[2], ORDER)

    return types.int64(WORDS, types.int64, types.int64), codegen


@intrinsic
def get(typingctx, pointer, index):
    """Read a word."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.gep(args[0], [args[1]]), ORDER, 8)

    return types.int64(WORDS, types.int64), codegen


@intrinsic
def put(typingctx, pointer, index, value):
    """Write a word."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], builder.gep(args[0], [args[1]]), ORDER, 8)
        return context.get_dummy_value()

    return types.void(WORDS, types.int64, types.int64), codegen


@intrinsic
def replace(typingctx, pointer, index, old, new):
    """Write `new` if the word is `old`; return whether it was."""

    def codegen(context, builder, signature, args):
        word = builder.gep(args[0], [args[1]])
        return builder.extract_value(builder.cmpxchg(word, args[2], args[3], ORDER), 1)

    return types.boolean(WORDS, types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Leave the core to its other thread, and the bus to others, for a moment."""

    def codegen(context, builder, signature, args):
        triple = builder.module.triple
        name = "llvm.x86.sse2.pause" if triple.startswith(("x86_64", "i686")) else None
        if name:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def ticks(typingctx):
    """Read the processor's clock, which runs at a rate of its own; 0 where there is none."""

    def codegen(context, builder, signature, args):
        x86 = builder.module.triple.startswith(("x86_64", "i686"))
        # the cycle counter of other processors is not for programs to read
        name = "llvm.readcyclecounter" if x86 else "llvm.readsteadycounter"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), name)
        return builder.call(function, [])

    return types.int64(), codegen


@intrinsic
def call(typingctx, kernel, desc, worker):
    """Call the kernel at an address with the descriptor at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(args[1], I64.as_pointer()), args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen

"""How the processor rounds while a kernel runs: the control word of x86-64's vector units (MXCSR).

Intel's cores take some hundred cycles for an operation that makes or reads a denormal, and strong
gates make many. Kernels run with results below the smallest normal number flushed to 0; what is
denormal in memory is read as it is. AArch64 has one mode for both (FZ of FPCR) and cores that
need neither: there the mode is left alone.

LLVM takes arithmetic for the same in any mode. But to it `ldmxcsr` may write to any memory, and all
numbers of a kernel come from memory and go there: nothing is computed on the other side of one.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nbdelta.cpu._llvm import I8, I32

# to nearest, no exception traps, and results that underflow are 0
FLUSHING = 0x1F80 | 0x8000


def _access(builder, instruction, word):
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
    name = f"llvm.x86.sse.{instruction}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(word, I8.as_pointer())])


def _is_x86(builder):
    return builder.module.triple.startswith(("x86_64", "i686"))


@intrinsic
def begin_flushing(typingctx):
    """Begin to flush denormal results to 0 on this thread; return what `end_flushing` puts back.

    The mode is the same whatever the caller's was, so that it does not matter to the bits.
    """

    def codegen(context, builder, signature, args):
        if not _is_x86(builder):
            return ir.Constant(I32, 0)
        word = cgutils.alloca_once(builder, I32)
        _access(builder, "stmxcsr", word)
        before = builder.load(word)
        builder.store(ir.Constant(I32, FLUSHING), word)
        _access(builder, "ldmxcsr", word)
        return before

    return types.int32(), codegen


@intrinsic
def end_flushing(typingctx, before):
    """Put back the mode that `begin_flushing` found."""

    def codegen(context, builder, signature, args):
        if _is_x86(builder):
            word = cgutils.alloca_once_value(builder, args[0])
            _access(builder, "ldmxcsr", word)
        return context.get_dummy_value()

    return types.void(types.int32), codegen

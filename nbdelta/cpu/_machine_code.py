"""Machine code of kernels, loaded by LLVM alone.

Numba's way of loading what it has cached imports all that it could compile first, which takes
longer than everything else that a call does in a new process.
"""

from types import SimpleNamespace

import llvmlite.binding as llvm
from numba.core import config, types
from numba.extending import intrinsic

# the code stays as long as the process: threads may run it, and others know its address
_engines = []


@intrinsic
def call(typingctx, function, desc, worker):
    """Call a function that never raises.

    Numba would make an exception of what it returns, and its code then needs Python and Numba.
    """
    dispatcher, signature = function.dispatcher, types.void(desc, worker)
    dispatcher.compile(signature)

    def codegen(context, builder, _, args):
        result = dispatcher.overloads[signature.args]
        context.add_linking_libs([result.library])
        context.call_internal_no_propagate(builder, result.fndesc, signature, args[1:])
        return context.get_dummy_value()

    return types.void(function, desc, worker), codegen


def pack(result):
    """Return what `load` takes, in pure Python, of what Numba's compiler returns."""
    library = result.library
    _, _, (code, bitcode) = library.serialize_using_object_code()
    module = llvm.parse_bitcode(bitcode)
    values = (*module.functions, *module.global_variables)
    names = [x.name for x in values if x.is_declaration and not x.name.startswith("llvm.")]
    return code, result.fndesc.llvm_cfunc_wrapper_name, names


def load(target_context, code, entry_point, names):
    """Load code that `pack` returned.

    Parameters
    ----------
    target_context : object
        Numba's.
    code : bytes
        Object file.
    entry_point : str
        Function of it.
    names : list of str
        What it takes from elsewhere, mostly functions of the C library. LLVM would end the process
        if one of them was not there.

    Returns
    -------
    object
        What Numba needs to have of a compilation, or None if a name is unknown.
    """
    if not all(map(llvm.address_of_symbol, names)):
        # something of Numba's own
        target_context.refresh()
        if not all(map(llvm.address_of_symbol, names)):
            return None
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), machine, use_lmm=config.USE_LLVMLITE_MEMORY_MANAGER
    )
    if config.ENABLE_PROFILING:
        engine.enable_jit_events()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return SimpleNamespace(
        library=SimpleNamespace(get_pointer_to_function=engine.get_function_address),
        fndesc=SimpleNamespace(llvm_cfunc_wrapper_name=entry_point),
    )

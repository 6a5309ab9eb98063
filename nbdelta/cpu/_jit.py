"""The only place that calls ``numba.njit``: every option of the CPU kernels is here."""

import hashlib
import warnings
from functools import partial
from pathlib import Path

import numba
from numba.core.caching import FunctionCache
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering

# Numba's disk cache notices an edit of the file that defines a kernel, not of the files it
# imports. Every kernel refers to this number, which makes it a part of the cache key.
SOURCES = int.from_bytes(
    hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).digest()[:7]
)

# one per kernel: a descriptor of the call (see _call.py) and the number of the worker
SIGNATURE = "void(int64[::1], int64)"


_OPTIONS = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}


@register_pass(mutates_CFG=True, analysis_only=False)
class _HelperLowering(NativeLowering):
    """Write a helper as LLVM code and stop there.

    Numba would optimise it and make machine code of it, and do the same again in every function
    that calls it, up to the kernel. Only the kernel's is ever run.
    """

    _name = "nbdelta_helper_lowering"

    def run_pass(self, state):
        state.flags.no_compile = True
        super().run_pass(state)
        library = state.library
        library._optimize_final_module = lambda: None
        library._finalize_final_module = partial(setattr, library, "_finalized", True)
        # Numba tells functions apart by their entry points: any object that is like no other
        entry_point = [].append
        state.cr = state.cr._replace(cfunc=entry_point)
        state.targetctx.insert_user_function(entry_point, state.cr.fndesc, [library])
        return True


class _HelperCompiler(CompilerBase):
    def define_pipelines(self):
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        steps = PassManager("nbdelta_helper")
        for step, description in manager.passes:
            steps.add_pass(_HelperLowering if step is NativeLowering else step, description)
        steps.finalize()
        return [steps]


def njit():
    """Compile a function that kernels call, and Python cannot.

    No fastmath: the tiles say themselves where a product and a sum become one ``fma``, and NaN,
    infinities and the order of every sum stay as written.
    """
    return numba.njit(no_cpython_wrapper=True, pipeline_class=_HelperCompiler, **_OPTIONS)


def parallel(function):
    """Compile a function with a ``prange`` that Python calls."""
    return numba.njit(parallel=True, **_OPTIONS)(function)


class _Cache(FunctionCache):
    """Numba's disk cache under a key of our own.

    Numba's key would be what a kernel's closure holds, where the same helper is another object in
    every process.
    """

    def __init__(self, function, key):
        super().__init__(function)
        self._key = key

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), (SOURCES, *self._key)


def kernel(*key):
    """Compile an entry point ``(desc, worker)`` at once, through the disk cache if there is one.

    Parameters
    ----------
    *key
        What this specialisation differs in from others of the same function, as strings, numbers
        and types.
    """

    def compile_kernel(function):
        try:
            dispatcher = numba.njit(**_OPTIONS)(function)
            dispatcher._cache = _Cache(function, [getattr(k, "__name__", k) for k in key])
            dispatcher.compile(SIGNATURE)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                raise
            warnings.warn(
                "nbdelta compiles its kernels anew in this process, the cache cannot be used: "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
            dispatcher = numba.njit(**_OPTIONS)(function)
            dispatcher.compile(SIGNATURE)
        dispatcher.disable_compile()
        return dispatcher

    if len(key) == 1 and callable(key[0]) and not isinstance(key[0], type):
        function, key = key[0], ()
        return numba.njit(SIGNATURE, cache=True, **_OPTIONS)(function)
    return compile_kernel

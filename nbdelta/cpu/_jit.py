"""The only place that calls ``numba.njit``: every option of the CPU kernels is here."""

import contextlib
import ctypes
import gc
import hashlib
import itertools
import os
import pickle
import warnings
from functools import partial
from pathlib import Path

import numba
from numba import types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import InlineOverloads, NativeLowering, NopythonRewrites
from numba.core.untyped_passes import DeadBranchPrune, InlineClosureLikes

from nbdelta.cpu._float_mode import begin_flushing, end_flushing
from nbdelta.cpu._machine_code import call, load, pack
from nbdelta.forks import wait_for

# Numba's disk cache notices an edit of the file that defines a kernel, not of the files it
# imports. Every kernel refers to this number, which makes it a part of the cache key.
SOURCES = int.from_bytes(
    hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).digest()[:7]
)

# of every kernel: a descriptor of the call (see _call.py) and the number of the worker
SIGNATURE = types.void(types.CPointer(types.int64), types.int64)
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


_OPTIONS = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}


def _number_functions_apart():
    """Let Numba count the functions that it compiles from a number that no other process has.

    A symbol is made of a function's name and its number. Where two processes counted alike, two
    forms of a helper had one symbol in the cached code of two kernels, and a process that loaded
    both ran one of them with the helpers of the other.
    """
    FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(6)))


_number_functions_apart()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_number_functions_apart)
# of a kernel that another thread compiles
wait_for(global_compiler_lock)


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


# Numba's steps for closures, expressions of whole arrays, and functions that are to be inlined
# before LLVM sees them: nothing that kernels have
_NOT_NEEDED = InlineClosureLikes, InlineOverloads, NopythonRewrites


class _HelperCompiler(CompilerBase):
    def define_pipelines(self):
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        steps, pruned = PassManager("nbdelta_helper"), False
        for step, description in manager.passes:
            # branches are pruned once: the second time is for what was inlined since
            if step in _NOT_NEEDED or (step is DeadBranchPrune and pruned):
                continue
            pruned |= step is DeadBranchPrune
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


class _Entry(CompileResultCacheImpl):
    """What the cache keeps of a kernel: its code, its key, and a digest of both."""

    key = None

    def _digest(self, code):
        return hashlib.sha256(repr(self.key).encode() + code).digest()

    def reduce(self, result):
        code = pickle.dumps(pack(result))
        return self._digest(code), code

    def rebuild(self, target_context, entry):
        digest, code = entry
        # Two processes that begin at once may give two kernels the same file
        if digest != self._digest(code):
            raise ValueError("not this kernel, or damaged")
        return load(target_context.numbas, *pickle.loads(code))


class _NotRefreshed:
    """Numba's target context for the look into the cache, which would refresh it first."""

    def __init__(self, context):
        self.numbas, self.codegen = context, context.codegen

    def refresh(self):
        """Import nothing: code that is there needs no compiler."""


class _Cache(FunctionCache):
    """Numba's disk cache under a key of our own, and one that nothing on the disk can stop.

    Numba's key would be what a kernel's closure holds, where the same helper is another object in
    every process.
    """

    _impl_class = _Entry

    def __init__(self, function, key):
        super().__init__(function)
        self._key = key

    def _index_key(self, sig, codegen):
        self._impl.key = sig, codegen.magic_tuple(), (SOURCES, *self._key)
        return self._impl.key

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, _NotRefreshed(target_context))
        except Exception:  # whatever unpickling something else may raise
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception as error:  # or it may read a damaged index that it could not replace
            _warn_of_cache(error)


def _warn_of_cache(error):
    warnings.warn(
        f"nbdelta compiles its kernels anew in every process, the cache cannot be used: {error}",
        RuntimeWarning,
        stacklevel=2,
    )


@contextlib.contextmanager
def _collector_paused():
    """Look for no garbage meanwhile: what a compiler makes stays, and there is ever more of it."""
    # the lock keeps out other compilations, and forks
    with global_compiler_lock:
        enabled = gc.isenabled()
        try:
            gc.disable()
            yield
        finally:
            if enabled:
                gc.enable()


def kernel(*key):
    """Compile an entry point ``(desc, worker)`` at once, through the disk cache if there is one.

    Parameters
    ----------
    *key
        What this specialisation differs in from others of the same function, as strings, numbers
        and types.

    Returns
    -------
    function
        Decorator. What it makes is called from Python, without holding its lock, with the address
        of a descriptor; compiled code may call its ``address``.
    """

    def compile_kernel(function):
        body = njit()(function)

        # here for all kernels, however they are called; none of them raises
        def entry(desc, worker):
            mode = begin_flushing()
            call(body, desc, worker)
            end_flushing(mode)

        entry.__qualname__ = function.__qualname__  # what profiles and Numba's events show
        types_of_it = SIGNATURE.args, SIGNATURE.return_type
        compiled = CFunc(entry, types_of_it, {}, {"error_model": "numpy"})
        try:
            compiled._cache = _Cache(function, [getattr(k, "__name__", k) for k in key])
        except (OSError, RuntimeError) as error:  # Numba finds no folder that can be written to
            _warn_of_cache(error)
        with _collector_paused():
            compiled.compile()
        entry = _ENTRY(compiled.address)
        entry.address, entry.compiled = compiled.address, compiled
        return entry

    return compile_kernel

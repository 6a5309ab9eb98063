"""``python -m nbdelta info``: versions and what the kernels use of this machine."""

import ctypes.util
import importlib.metadata
import os
import platform
from pathlib import Path

from nbdelta import console as out

_PACKAGES = (
    *("numba", "llvmlite", "numba-cuda", "numpy", "ml_dtypes", "torch", "transformers", "rich"),
)
_FEATURES = (
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx512fp16", "amx-bf16"),
    *("avx2", "fma", "f16c", "neon", "fullfp16", "bf16", "sve"),
)


def info():
    """Print the report; returns 0."""
    console = out.console("info")
    table = out.table("nbdelta", "", "")
    for name, value in report():
        table.add_row(name, out.plain(value))
    table.show_header = False
    console.print(table)
    return 0


def report():
    """Yield ``(name, value)`` pairs; a part that cannot be found out says why."""
    for name, find in (
        ("nbdelta", lambda: _version("nbdelta")),
        ("Python", lambda: f"{platform.python_version()} ({platform.platform()})"),
        *((package, lambda package=package: _version(package)) for package in _PACKAGES),
        ("CPU", _cpu),
        ("compiled for", _target),
        ("CPU features", _features),
        ("vectors", _vectors),
        ("bfloat16", _halves),
        ("threads", _threads),
        ("cache", _cache),
        ("CUDA", _cuda),
    ):
        try:
            yield name, find()
        except Exception as error:  # a report that stops half-way helps nobody
            yield name, f"unknown ({type(error).__name__}: {error})"


def _version(package):
    if package == "nbdelta":
        import nbdelta

        return nbdelta.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _target():
    import numba
    from llvmlite import binding

    forced = numba.config.CPU_NAME
    if forced and forced != "host":
        return f"{forced} (NUMBA_CPU_NAME; this machine is {binding.get_host_cpu_name()})"
    return binding.get_host_cpu_name()


def _features():
    import numba
    from llvmlite import binding

    if numba.config.CPU_NAME and numba.config.CPU_NAME != "host":
        return f"those of {numba.config.CPU_NAME}, and NUMBA_CPU_FEATURES: " + (
            numba.config.CPU_FEATURES or "none"
        )
    host = binding.get_host_cpu_features()
    return " ".join(name for name in _FEATURES if host.get(name)) or "none of those known here"


def _vectors():
    from nbdelta.cpu import _vector_unit

    bits, registers = _vector_unit.vector_unit()
    return f"{registers} registers of {bits} bits"


def _halves():
    from nbdelta.cpu import _matrix_unit

    names = ("in float32", "by dot products of pairs", "on the matrix unit (AMX)")
    return f"q, k and v multiplied {names[_matrix_unit.unit_of_halves()]}"


def _threads():
    from nbdelta.cpu._team import thread_count

    return f"{thread_count()} of {os.cpu_count()} cores (NUMBA_NUM_THREADS sets another number)"


def _cache():
    from numba.core.caching import CompileResultCacheImpl

    from nbdelta.cpu import _jit

    try:
        # any function of the folder will do: Numba keeps a cache for each source file's folder
        locator = CompileResultCacheImpl(_jit.kernel).locator
    except RuntimeError as error:
        return f"none: {error}; every process compiles anew"
    folder = Path(locator.get_cache_path())
    kernels = list(folder.glob("*.nbc")) if folder.exists() else []
    size = sum(path.stat().st_size for path in kernels) / 2**20
    try:
        locator.ensure_cache_path()
        state = "writable"
    except OSError as error:
        state = f"not writable: {error}"
    return f"{folder} ({state}; {len(kernels)} kernels, {size:.1f} MB)"


def _cuda():
    from nbdelta.dispatch import cuda_rejection_reason

    reason = cuda_rejection_reason()
    if reason is None:
        from nbdelta.cuda._jit import devices

        return "; ".join(devices())
    driver = ctypes.util.find_library("cuda") or ctypes.util.find_library("nvcuda")
    found = f"driver library {driver}" if driver else "no driver library on this machine"
    return f"{found}; {reason}"

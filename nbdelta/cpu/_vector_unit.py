"""What the processor that Numba compiles for has: vector registers, instructions, caches."""

from pathlib import Path

import numba
from llvmlite import binding

# lanes of a tile = tokens of a block = columns of a state strip, for every dtype and machine
W = 16
LINE = 64  # bytes of a cache line

_AVX512_NAMES = ("avx512", "icelake", "sapphirerapids", "graniterapids", "znver4", "znver5")
_AVX2_NAMES = ("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3", "x86-64-v3")


def features():
    """Instruction sets that Numba compiles for, each with a plus or a minus."""
    named = numba.config.CPU_FEATURES
    if named is None:
        named = binding.get_host_cpu_features().flatten()
    return set(named.split(","))


_ARM = binding.get_default_triple().startswith(("aarch64", "arm64"))
# without instructions for it LLVM would call a library function that a process may not have
CONVERTS_HALF = _ARM or "+f16c" in features()
# x 2^n in one instruction, on whole registers of AVX-512
SCALES = "+avx512f" in features()


def _name():
    """Processor that Numba compiles for, as LLVM calls it."""
    named = numba.config.CPU_NAME
    return binding.get_host_cpu_name() if named in (None, "", "host") else named


# whether rows of a state that follow each other are in the cache before they are asked for, as on
# AMD's cores with AVX-512; Intel's stop at the end of every page
FORESEES_ROWS = _name().startswith("znver")


def vector_unit():
    """Bits and number of the vector registers that Numba compiles for.

    Numba takes the features of this machine, or ``NUMBA_CPU_FEATURES``. ``NUMBA_CPU_NAME`` can only
    narrow them: ``haswell`` gives the AVX2 shape of every tile on a machine with AVX-512.
    """
    name, has = numba.config.CPU_NAME, features()
    wide_name = not name or any(part in name for part in _AVX512_NAMES)
    avx2_name = wide_name or any(part in name for part in _AVX2_NAMES)
    if "+avx512f" in has and wide_name:
        return 512, 32
    if "+avx2" in has and avx2_name:
        return 256, 16
    return 128, 32 if _ARM else 16


BITS, REGISTERS = vector_unit()


# products of bfloat16 pairs, summed in float32, in one instruction
DOTS_BFLOAT16 = BITS == 512 and "+avx512bf16" in features()
if DOTS_BFLOAT16:
    # inline assembly without a parser for it ends the process
    binding.initialize_native_asmparser()


def native_lanes(itemsize):
    """Lanes of one vector register."""
    return BITS // (8 * itemsize)


def side_by_side():
    """Strips of a state that a register tile has side by side.

    With one there is a load for each multiply-add, more than Intel's cores with AVX-512 keep up
    with.
    """
    return 2 if BITS == 512 and not FORESEES_ROWS else 1


def tile_rows(itemsize, side=1):
    """Rows of a register tile (``MR``): its accumulators take half of the registers."""
    return max(1, REGISTERS // 2 * native_lanes(itemsize) // (W * side))


def second_cache():
    """Bytes of the second cache of a core as Linux tells them, elsewhere half a megabyte."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((folder / "level").read_text()) == 2:
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 512 << 10

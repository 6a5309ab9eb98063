"""What the kernels may use of a multiprocessor, and what they must contain.

A row is for the kernels whose names (of their files' ``specialisations()``) match its pattern: the
first one counts, and none may be left over. `occupancy` follows from registers and shared memory.
"""

from typing import NamedTuple


class Budget(NamedTuple):
    """One row of the table."""

    pattern: str  # as in fnmatch
    registers: int  # of a thread, at most
    shared: int  # bytes of a block, static and dynamic, at most
    blocks: int  # on a multiprocessor of sm_90, at least
    contains: tuple[str, ...] = ()  # PTX instructions


TENSOR = ("mma.sync.aligned.m16n8k16", "ldmatrix.sync", "cp.async")
PLANES = TENSOR[:2]

BUDGETS = (
    # bandwidth is all they need: 16 warps a multiprocessor and more
    Budget("gate *", 48, 0, 8),
    Budget("cumsum float64 to float64, staged", 64, 36864, 6),
    Budget("cumsum *, staged", 64, 19968, 8),
    Budget("cumsum *", 64, 0, 8),
    Budget("tril float64, BT 64", 168, 45584, 4),
    Budget("tril float64, *", 128, 29216, 7),
    Budget("tril *", 96, 22800, 9),
    Budget("triangular float64", 168, 20736, 6),
    Budget("triangular *", 168, 10368, 6),
    # 64 KB of states on their way from and to memory: four blocks of 128 rows, three of 256
    Budget("recurrent *, K 1[0-9][0-9], strided", 168, 10 * 1024, 3),
    Budget("recurrent *, strided", 255, 20 * 1024, 2),
    Budget("recurrent *, K 2[0-9][0-9]*", 168, 20 * 1024, 3),
    Budget("recurrent *", 128, 10 * 1024, 4),
    # 64 tokens of 128 channels; the state of a scan is half of its registers
    Budget("chunk intra *16 K 128 gda, 227 KB", 128, 50 * 1024, 4, TENSOR),
    Budget("chunk intra *16 K 128 kda, 227 KB", 200, 84 * 1024, 2, TENSOR),
    Budget("chunk scan *16 K 128 *, 227 KB, V 32", 232, 227 * 1024, 1, (*TENSOR, "movmatrix")),
    Budget("chunk intra *", 255, 99 * 1024, 1, TENSOR),
    Budget("chunk scan *", 255, 227 * 1024, 1, TENSOR),
    Budget("chunk pack *, turned", 64, 9 * 1024, 4),
    Budget("chunk pack *", 64, 0, 4),
    Budget("backward pairs, *", 96, 52 * 1024, 2),
    # a part of a state, or of a product, in registers; tiles of 256 channels in three planes
    Budget("backward errors, bfloat16", 168, 36 * 1024, 2, PLANES),
    Budget("backward errors, *", 208, 68 * 1024, 1, PLANES),
    Budget("backward scan, bfloat16", 224, 43 * 1024, 1, PLANES),
    Budget("backward scan, *", 255, 91 * 1024, 1, PLANES),
    Budget("backward reads, K 256", 224, 62 * 1024, 1, PLANES),
    Budget("backward reads, *", 176, 37 * 1024, 1, PLANES),
    # without tensor cores
    Budget("backward channels, *", 255, 76 * 1024, 1),
    Budget("backward weights", 168, 27 * 1024, 1),
    Budget("backward heads, *", 168, 0, 2),
    Budget("backward gates*", 80, 2 * 1024, 6),
    Budget("backward *", 64, 2 * 1024, 8),
)

# of a multiprocessor: bytes of shared memory, and those that a block may have
SHARED = {"sm_80": (164 * 1024, 163 * 1024), "sm_90": (228 * 1024, 227 * 1024)}
SHARED["sm_100"] = SHARED["sm_90"]
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32


def occupancy(arch, threads, registers, shared):
    """Blocks that a multiprocessor holds at once."""
    # a warp gets registers by 256, a block shared memory by 128 bytes and 1 KB for the system
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED[arch][0] // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, THREADS // threads, BLOCKS)

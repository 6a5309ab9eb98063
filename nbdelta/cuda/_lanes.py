"""What the simulator does in the place of PTX: the lanes of a warp, one Python thread each.

Lanes meet to see each other's values; shared memory is addressed in bytes, as on the device. An
integer is a Python int of 32 or 64 bits, a float32 a NumPy scalar.
"""

import ctypes
import threading
from functools import partial

import numpy as np

MASK = 0xFFFFFFFF


def int32(x):
    """The 32 bits of an integer with a sign."""
    return (int(x) & MASK ^ 1 << 31) - (1 << 31)


def uint32(x):
    """The lowest 32 bits of an integer."""
    return int(x) & MASK


def uint64(x):
    """The lowest 64 bits of an integer."""
    return int(x) & (1 << 64) - 1


class _Warp:
    """Where the threads of a simulated warp meet and see each other's values."""

    def __init__(self):
        self.turns = [0] * 32
        # two sets in turn: who writes one has seen everybody come for the other
        self.values = [None] * 32, [None] * 32
        self.mutex, self.here = threading.Lock(), 0
        self.gates = [threading.Lock() for _ in range(32)]
        for gate in self.gates:
            gate.acquire()

    def exchange(self, lane, value, together):
        """Every lane gives a value and gets the list of all 32, or what `together` makes of it."""
        values = self.values[self.turns[lane] % 2]
        self.turns[lane] += 1
        values[lane] = value
        with self.mutex:
            self.here = (self.here + 1) % 32
            last = self.here == 0
        if last:
            if together:
                values[:] = together(values)
            for i in range(32):
                if i != lane:
                    self.gates[i].release()
        elif not self.gates[lane].acquire(timeout=60):
            raise RuntimeError("not all lanes of a warp came")
        return list(values)


_warps = {}  # the simulator runs one block at a time: (its manager, warp) to the warp


def simulated_exchange(value, together=None):
    """Give all lanes of a warp the values of all lanes; also returns the own lane.

    `together`: makes a list for the lanes of the list of their values; called once.
    """
    thread = threading.current_thread()
    key = id(thread._manager), thread.thread_id // 32
    if key not in _warps:
        for old in [k for k in list(_warps) if k[0] != key[0]]:
            _warps.pop(old, None)
    warp = _warps.setdefault(key, _Warp())
    lane = thread.thread_id % 32
    return warp.exchange(lane, value, together), lane


_shared = {}  # manager of the block to its dynamic shared memory


def simulated_shared_address(array):
    """Shared memory starts at address 0, and a block has one dynamic array."""
    manager = threading.current_thread()._manager
    if manager not in _shared:
        _shared.clear()
        _shared[manager] = array.view(np.uint8).reshape(-1)
    return 0


def _bytes_at(address, n):
    memory = _shared[threading.current_thread()._manager]
    assert 0 <= address <= len(memory) - n, f"shared address {address} of {len(memory)}"
    assert address % n == 0, f"shared address {address} is not a multiple of {n}"
    return memory[address : address + n]


def _real(kind, bits):
    """A 16-bit pattern, or an array of them, as float32."""
    bits = np.asarray(bits)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _rounded(kind, x):
    """The 16-bit pattern nearest to a float32."""
    x = np.float32(x)
    if kind == "f16":
        with np.errstate(over="ignore"):
            return int(x.astype(np.float16).view(np.uint16))
    bits = int(x.view(np.uint32))
    if np.isnan(x):
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _split(word):
    return word & 0xFFFF, word >> 16


def _multiply(kind, lanes):
    """The products and sums of a warp: registers to matrices and back."""
    a, b, acc = (np.array([lane[i] for lane in lanes]) for i in range(3))
    a, b = (x.astype(np.uint32).view(np.uint16) for x in (a, b))
    # (g, c, right half of the columns, lower half of the rows, one of a pair)
    a = _real(kind, a).reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)
    # (g, c, lower half of the rows, one of a pair)
    b = _real(kind, b).reshape(8, 4, 2, 2).transpose(2, 1, 3, 0).reshape(16, 8)
    acc = acc.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 1, 8)
    terms = a.astype(np.float64)[:, :, None] * b.astype(np.float64)
    total = _cut_off_sum(np.concatenate([acc, terms], 1))
    return list(total.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(32, 4))


def _cut_off_sum(terms):
    """Sums along axis 1 as Hopper's tensor cores make them.

    They cut off, towards zero, what of a term is below the 25th bit after the first of the largest
    one, and then what of the sum is below the last bit of a float32.
    """
    with np.errstate(all="ignore"):
        largest = np.frexp(np.abs(terms).max(1, keepdims=True))[1]
        unit = np.ldexp(1.0, np.maximum(largest, -125) - 26)
        total = (np.trunc(terms / unit) * unit).sum(1)
        near = total.astype(np.float32)
        cut = np.where(np.abs(near) > np.abs(total), np.nextafter(near, np.float32(0)), near)
    return np.where(np.isfinite(total), cut, near)


class Lanes:
    """The twin of `nbdelta.cuda._ptx.Ptx`: does what that emits."""

    @staticmethod
    def u32(x):
        return x & MASK

    @staticmethod
    def u64(x):
        return x

    @staticmethod
    def f32(x):
        return np.float32(x)

    @staticmethod
    def real(type, x):
        return np.dtype(str(type)).type(x)

    @staticmethod
    def iadd(a, b):
        return a + b

    @staticmethod
    def imul(a, b):
        return a * b

    @staticmethod
    def shl(a, n):
        return a << n & MASK

    @staticmethod
    def shr(a, n):
        return a >> n

    @staticmethod
    def xor(a, b):
        return a ^ b

    @staticmethod
    def bits_and(a, b):
        return a & b

    @staticmethod
    def wide(a):
        return a

    @staticmethod
    def less(a, b):
        return int32(a) < int32(b)

    @staticmethod
    def both(a, b):
        return a and b

    @staticmethod
    def select(condition, a, b):
        return a if condition else b

    @staticmethod
    def add(a, b):
        return a + b

    @staticmethod
    def sub(a, b):
        return a - b

    @staticmethod
    def mul(a, b):
        return a * b

    @staticmethod
    def fma(a, b, c):
        return type(c)(np.float64(a) * np.float64(b) + np.float64(c))

    @staticmethod
    def neg(a):
        return -a

    @staticmethod
    def flip(a, sign):
        return -a if sign >> 31 & 1 else a

    @staticmethod
    def max(a, b):
        return np.maximum(a, b)

    @staticmethod
    def ex2(a):
        return np.exp2(a) if not a < -126 else np.float32(0)

    @staticmethod
    def pack(kind, low, high):
        return _rounded(kind, low) | _rounded(kind, high) << 16

    @staticmethod
    def unpack(kind, x):
        return list(_real(kind, _split(x)))

    @staticmethod
    def mma(kind, acc, a, b):
        lanes, lane = simulated_exchange((a, b, acc), partial(_multiply, kind))
        return list(lanes[lane])

    @staticmethod
    def transpose(x):
        lanes, lane = simulated_exchange(x)
        g, c = lane // 4, lane % 4
        low, high = (_split(lanes[4 * (2 * c + j) + g // 2])[g % 2] for j in range(2))
        return low | high << 16

    @staticmethod
    def shuffle_xor(x, bits):
        lanes, lane = simulated_exchange(x)
        return lanes[lane ^ bits]

    @staticmethod
    def from_lane(x, i):
        return simulated_exchange(x)[0][i]

    @staticmethod
    def ldmatrix(address, offset=0, trans=False):
        lanes, lane = simulated_exchange(address + offset)
        g, c = lane // 4, lane % 4
        out = []
        for i in range(4):
            rows = [_bytes_at(at, 16).view(np.uint16) for at in lanes[8 * i : 8 * i + 8]]
            if trans:
                low, high = rows[2 * c][g], rows[2 * c + 1][g]
            else:
                low, high = rows[g][2 * c], rows[g][2 * c + 1]
            out.append(int(low) | int(high) << 16)
        return out

    @staticmethod
    def load_shared(n, real, address, offset=0):
        data = _bytes_at(address + offset, 4 * n)
        return list(data.view(np.float32)) if real else data.view(np.uint32).tolist()

    @staticmethod
    def store_shared(address, values, offset=0):
        _bytes_at(address + offset, 4 * len(values))[:] = _raw(values)

    @classmethod
    def store_column(cls, condition, address, pitch, values):
        for i, x in enumerate(values):
            if condition:
                cls.store_shared(address, [x], i * pitch)

    @staticmethod
    def store_global(address, values, offset=0):
        raw = _raw(values).tobytes()
        ctypes.memmove(address + offset, raw, len(raw))

    @classmethod
    def store_global_if(cls, condition, address, values):
        if condition:
            cls.store_global(address, values)

    @staticmethod
    def load_real_if(condition, dtype, address):
        if not condition:
            return np.float32(0)
        if dtype == "bfloat16":
            return _real("bf16", np.frombuffer(ctypes.string_at(address, 2), np.uint16))[0]
        size = np.dtype(dtype).itemsize
        return np.float32(np.frombuffer(ctypes.string_at(address, size), dtype)[0])

    @staticmethod
    def store_real_if(condition, dtype, address, x):
        if condition:
            kind = {"bfloat16": "bf16", "float16": "f16"}.get(dtype)
            raw = np.uint16(_rounded(kind, x)) if kind else np.float32(x)
            ctypes.memmove(address, raw.tobytes(), raw.nbytes)


def _raw(values):
    """Floats or bit patterns as bytes."""
    real = isinstance(values[0], np.floating)
    return np.array(values, np.float32 if real else np.uint32).view(np.uint8)


def simulated_copy(address, source, size):
    """16 bytes to shared memory, zeros after the first `size` of them."""
    target = _bytes_at(int(address), 16)
    target[:] = 0
    target[: int(size)] = np.frombuffer(ctypes.string_at(int(source), int(size)), np.uint8)

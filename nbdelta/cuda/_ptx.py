"""PTX instructions: the only file with inline PTX. `_lanes` is what the simulator does instead.

`Ptx` is the vocabulary of tile functions.
"""

import numpy as np
from llvmlite import ir
from numba import types

from nbdelta.cuda._jit import SIMULATOR, intrinsic
from nbdelta.cuda._lanes import (
    Lanes,
    simulated_copy,
    simulated_exchange,
    simulated_shared_address,
)
from nbdelta.cuda._tile_functions import f32, i32, tile_maker, u32, u64, void

F32, F64, I16, I32, I64 = (
    ir.FloatType(),
    ir.DoubleType(),
    *(ir.IntType(n) for n in (16, 32, 64)),
)
_LETTERS = {F32: "f", F64: "d", I16: "h", I32: "r", I64: "l"}


def asm(builder, text, results=(), operands=(), effect=True):
    """Emit PTX. `effect` keeps it in order with all other accesses to memory.

    In the text ``$0, $1, ...`` are the results, then the operands.
    """
    constraints = ["=" + _LETTERS[t] for t in results] + [_LETTERS[x.type] for x in operands]
    constraints += ["~{memory}"] if effect else []
    result = ir.VoidType() if not results else results[0]
    if len(results) > 1:
        result = ir.LiteralStructType(results)
    code = ir.InlineAsm(
        ir.FunctionType(result, [x.type for x in operands]),
        text,
        ",".join(constraints),
        side_effect=effect,
    )
    # lanes meet there: the compiler must not move it into a branch that some of them take
    value = builder.call(code, operands, attrs=("convergent",) if ".sync" in text else ())
    if len(results) < 2:
        return [value] if results else []
    return [builder.extract_value(value, i) for i in range(len(results))]


# -- between the lanes of a warp


def _simulated_shuffle_xor(value, bits):
    values, lane = simulated_exchange(value)
    return values[lane ^ int(bits)]


@intrinsic(_simulated_shuffle_xor)
def shuffle_xor(typingctx, value, bits):
    """Value of lane ``lane ^ bits``; all 32 lanes take part. float32 or float64."""

    def codegen(context, builder, signature, args):
        return warp_shuffle_xor(builder, *args)

    return value(value, types.int32), codegen


def warp_shuffle_xor(builder, x, bits):
    """Emit `shuffle_xor`; bits may be a number."""
    if isinstance(bits, int):
        bits = ir.Constant(I32, bits)
    text = "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;"
    if x.type == F32:
        return asm(builder, text, [F32], [x, bits])[0]
    low, high = asm(builder, "mov.b64 {$0, $1}, $2;", [I32, I32], [x], effect=False)
    low, high = (asm(builder, text, [I32], [part, bits])[0] for part in (low, high))
    return asm(builder, "mov.b64 $0, {$1, $2};", [F64], [low, high], effect=False)[0]


def round_to_bfloat16(builder, x):
    """A float32 as the bits of the nearest bfloat16."""
    return asm(builder, "cvt.rn.bf16.f32 $0, $1;", [I16], [x], effect=False)[0]


def round_pair(builder, dtype, low, high):
    """Two float32 as a word of the nearest bfloat16 or float16."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    return asm(builder, f"cvt.rn.{kind}x2.f32 $0, $2, $1;", [I32], [low, high], effect=False)[0]


class Ptx:
    """Emits the code of a tile function. Values are LLVM values, one per lane of the warp."""

    def __init__(self, builder):
        self.builder = builder

    def asm(self, text, results=(), operands=(), effect=True):
        return asm(self.builder, text, results, operands, effect)

    def u32(self, x):
        return ir.Constant(I32, x)

    def u64(self, x):
        return ir.Constant(I64, x)

    def f32(self, x):
        return ir.Constant(F32, x)

    def real(self, type, x):
        return ir.Constant(F64 if type == types.float64 else F32, x)

    # integers, of 32 or 64 bits

    def iadd(self, a, b):
        return self.builder.add(a, b)

    def imul(self, a, b):
        return self.builder.mul(a, b)

    def shl(self, a, n):
        return self.builder.shl(a, self.u32(n))

    def shr(self, a, n):
        return self.builder.lshr(a, self.u32(n))

    def xor(self, a, b):
        return self.builder.xor(a, b)

    def bits_and(self, a, b):
        return self.builder.and_(a, b)

    def wide(self, a):
        """A 32-bit number with 64 bits."""
        return self.builder.zext(a, I64)

    def less(self, a, b):
        return self.builder.icmp_signed("<", a, b)

    def both(self, a, b):
        return self.builder.and_(a, b)

    def select(self, condition, a, b):
        return self.builder.select(condition, a, b)

    # float32; the order of operations stays as it is written

    def add(self, a, b):
        return self.builder.fadd(a, b)

    def sub(self, a, b):
        return self.builder.fsub(a, b)

    def mul(self, a, b):
        return self.builder.fmul(a, b)

    def fma(self, a, b, c):
        return self.builder.fma(a, b, c)

    def neg(self, a):
        # NVVM knows no fneg
        return self.builder.fsub(self.f32(-0.0), a)

    def flip(self, a, sign):
        """`a` with its sign changed where the top bit of `sign` is set."""
        bits = self.builder.xor(self.builder.bitcast(a, I32), sign)
        return self.builder.bitcast(bits, F32)

    def max(self, a, b):
        """The larger number; NaN if either is."""
        return self.asm("max.NaN.f32 $0, $1, $2;", [F32], [a, b], False)[0]

    def ex2(self, a):
        return self.asm("ex2.approx.ftz.f32 $0, $1;", [F32], [a], False)[0]

    # pairs of 16-bit numbers, "bf16" or "f16", and the tensor cores

    def pack(self, kind, low, high):
        """Two float32 rounded to 16 bits each."""
        return self.asm(f"cvt.rn.{kind}x2.f32 $0, $2, $1;", [I32], [low, high], False)[0]

    def unpack(self, kind, x):
        """The two numbers of a pair."""
        if kind == "bf16":
            low, high = self.shl(x, 16), self.bits_and(x, self.u32(0xFFFF0000))
            return [self.builder.bitcast(y, F32) for y in (low, high)]
        text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
        return self.asm(text, [F32] * 2, [x], False)

    def mma(self, kind, acc, a, b):
        """``acc + a b``: 16 x 8 and 16 x 16 times 16 x 8."""
        text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        text += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        return self.asm(text, [F32] * 4, [*a, *b, *acc], False)

    # between the lanes

    def transpose(self, x):
        """An 8 x 8 matrix of 16-bit numbers, row g in lanes 4 g to 4 g + 3, transposed."""
        return self.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [I32], [x])[0]

    def shuffle_xor(self, x, bits):
        """The pair of lane ``lane ^ bits``."""
        return self.asm(f"shfl.sync.bfly.b32 $0, $1, {bits}, 31, -1;", [I32], [x])[0]

    def from_lane(self, x, i):
        """The float32 of lane i."""
        return self.asm(f"shfl.sync.idx.b32 $0, $1, {i}, 31, -1;", [F32], [x])[0]

    # shared memory, at 32-bit addresses

    def ldmatrix(self, address, offset=0, trans=False):
        """Four 8 x 8 matrices of 16-bit numbers; lane 8 i + r has the address of row r of i."""
        op = "ldmatrix.sync.aligned.m8n8.x4" + (".trans" if trans else "")
        text = f"{op}.shared.b16 {{$0,$1,$2,$3}}, [$4+{offset}];"
        return self.asm(text, [I32] * 4, [address])

    def load_shared(self, n, real, address, offset=0):
        """`n` (1, 2 or 4) neighbouring float32, or pairs."""
        kind = "f32" if real else "b32"
        text = f"ld.shared{_VECTOR[n]}.{kind} {_names(0, n)}, [${n}+{offset}];"
        return self.asm(text, [F32 if real else I32] * n, [address])

    def store_shared(self, address, values, offset=0):
        n = len(values)
        text = f"st.shared{_VECTOR[n]}.{_kind_of(values)} [$0+{offset}], {_names(1, n)};"
        self.asm(text, [], [address, *values])

    def store_column(self, condition, address, pitch, values):
        """One number per row, where the condition holds."""
        with self.builder.if_then(condition):
            for i, x in enumerate(values):
                self.store_shared(address, [x], i * pitch)

    # global memory, at 64-bit addresses

    def store_global(self, address, values, offset=0):
        n = len(values)
        text = f"st.global{_VECTOR[n]}.{_kind_of(values)} [$0+{offset}], {_names(1, n)};"
        self.asm(text, [], [address, *values])

    def store_global_if(self, condition, address, values):
        with self.builder.if_then(condition):
            self.store_global(address, values)

    def load_real_if(self, condition, dtype, address):
        """A number of any width as float32; zero, without a look, where the condition fails."""
        declare, load = _load_if_p(dtype, f32, "$0", "$1")
        text = f"{{.reg .pred p; {declare} setp.ne.b32 p, $2, 0; {load}}}"
        return self.asm(text, [F32], [address, self.builder.zext(condition, I32)])[0]

    def load_column(self, dtype, type, n, address, stride, count):
        """`n` numbers `stride` bytes apart as float32 or float64; zeros from `count` (32 bits) on.

        All in one text: the compiler would keep what it knows of the addresses for the next column.
        """
        declare, _ = _load_if_p(dtype, type, "", "")
        text = f"{{.reg .pred p; .reg .b64 a; {declare} mov.b64 a, ${n};"
        for i in range(n):
            _, load = _load_if_p(dtype, type, f"${i}", "a")
            text += f" setp.lt.s32 p, {i}, ${n + 2}; {load} add.s64 a, a, ${n + 1};"
        result = F64 if type == types.float64 else F32
        count = self.builder.trunc(count, I32)
        return self.asm(text + "}", [result] * n, [address, stride, count])

    def store_column_if(self, address, stride, count, values):
        """The first `count` (32 bits) of float32 or float64 numbers, `stride` bytes apart."""
        kind = "f64" if values[0].type == F64 else "f32"
        text = "{.reg .pred p; .reg .b64 a; mov.b64 a, $0;"
        for i in range(len(values)):
            text += f" setp.lt.s32 p, {i}, $2; @p st.global.{kind} [a], ${3 + i};"
            text += " add.s64 a, a, $1;"
        count = self.builder.trunc(count, I32)
        self.asm(text + "}", [], [address, stride, count, *values])

    def store_real_if(self, condition, dtype, address, x):
        """A float32 rounded to a number of 32 or 16 bits, where the condition holds."""
        store = {
            "float32": "@p st.global.f32 [$0], $1;",
            "bfloat16": "cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h;",
            "float16": "cvt.rn.f16.f32 h, $1; @p st.global.b16 [$0], h;",
        }[dtype]
        text = "{.reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; " + store + "}"
        self.asm(text, [], [address, x, self.builder.zext(condition, I32)])


def _load_if_p(dtype, type, x, address):
    """Registers to declare, and the text that loads x where p holds and makes it zero elsewhere."""
    kind, zero = ("f64", "0d0000000000000000") if type == types.float64 else ("f32", "0f00000000")
    if dtype == kind.replace("f", "float"):
        return "", f"mov.{kind} {x}, {zero}; @p ld.global.{kind} {x}, [{address}];"
    if dtype == "bfloat16":
        declare = ".reg .b16 h, z; .reg .f32 w; mov.b16 z, 0;"
        load = f"mov.b16 h, 0; @p ld.global.b16 h, [{address}]; mov.b32 w, {{z, h}};"
        source = "w"
    else:
        width, source = ("b16", "h") if dtype == "float16" else ("f" + dtype[5:], "d")
        none = "0" if width == "b16" else "0d0" + 15 * "0" if width == "f64" else "0f00000000"
        declare = f".reg .{width} {source};"
        load = f"mov.{width} {source}, {none}; @p ld.global.{width} {source}, [{address}];"
    stored = {"bfloat16": "f32", "float16": "f16"}.get(dtype, "f" + dtype[5:])
    if stored == kind:
        return declare, f"{load} mov.{kind} {x}, {source};"
    rounding = ".rn" if stored == "f64" else ""
    return declare, f"{load} cvt{rounding}.{kind}.{stored} {x}, {source};"


_VECTOR = {1: "", 2: ".v2", 4: ".v4"}


def _names(first, n):
    names = ",".join(f"${first + i}" for i in range(n))
    return names if n == 1 else "{" + names + "}"


def _kind_of(values):
    return "f32" if values[0].type == F32 else "b32"


tile = tile_maker(Ptx)


# -- instructions by themselves


def _instruction(simulated, text, result, *operands, effect=True):
    """A function for kernels of one PTX text: operands are numbered after the result."""
    llvm = {f32: F32, i32: I32, u32: I32, u64: I64}

    def make(e, *args):
        out = e.asm(text, [] if result == void else [llvm[result]], args, effect)
        return out[0] if out else None

    emitted = tile(result, *operands)(make)
    return np.errstate(all="ignore")(simulated) if SIMULATOR else emitted


def _lane_above(x, n):
    lanes, lane = simulated_exchange(x)
    return lanes[max(lane - int(n), 0)]


def _nothing():
    """Copies of the simulator are done at once."""


copy_async = _instruction(
    simulated_copy, "cp.async.cg.shared.global [$0], [$1], 16, $2;", void, u32, u64, u32
)
commit_copies = _instruction(_nothing, "cp.async.commit_group;", void)
wait_for_copies = _instruction(_nothing, "cp.async.wait_group 0;", void)
wait_for_all_but_last_copies = _instruction(_nothing, "cp.async.wait_group 1;", void)
# of the lane n below
shuffle_up = _instruction(_lane_above, "shfl.sync.up.b32 $0, $1, $2, 0, -1;", f32, f32, u32)
uniform = _instruction(
    lambda x: x, "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", u32, u32
)  # what all lanes agree on, in a register that the compiler knows them to
sync_warp = _instruction(lambda: simulated_exchange(0), "bar.warp.sync -1;", void)
ex2 = _instruction(Lanes.ex2, "ex2.approx.ftz.f32 $0, $1;", f32, f32, effect=False)
lg2 = _instruction(np.log2, "lg2.approx.ftz.f32 $0, $1;", f32, f32, effect=False)
rsqrt = _instruction(
    lambda x: np.float32(1) / np.sqrt(x), "rsqrt.approx.ftz.f32 $0, $1;", f32, f32, effect=False
)
reciprocal = _instruction(
    lambda x: np.float32(1) / x, "rcp.approx.ftz.f32 $0, $1;", f32, f32, effect=False
)


@tile(f32, u32)
def load_shared(e, address):
    return e.load_shared(1, True, address)[0]


@tile(void, u32, f32)
def store_shared(e, address, x):
    e.store_shared(address, [x])


@tile(void, u64, f32)
def store_global(e, address, x):
    e.store_global(address, [x])


@intrinsic(simulated_shared_address)
def shared_address(typingctx, array):
    """32-bit address of a shared array."""

    def codegen(context, builder, signature, args):
        from numba.cuda.np.arrayobj import make_array

        data = make_array(signature.args[0])(context, builder, args[0]).data
        to = ir.PointerType(addrspace=3) if data.type.is_opaque else data.type.pointee.as_pointer(3)
        return builder.ptrtoint(builder.addrspacecast(data, to), I32)

    return u32(array), codegen

"""Vector code that reads and writes memory, in any of the dtypes of arrays."""

from llvmlite import ir
from numba.core import cgutils

from nbdelta.cpu._llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    STORED,
    Value,
    constant,
    mask_of,
    resize,
    shape_of,
)
from nbdelta.cpu._vector_unit import CONVERTS_HALF, DOTS_BFLOAT16, W


class Memory:
    """The part of `nbdelta.cpu._simd.Emitter` that knows dtypes."""

    # ---- memory ----

    def _pointer(self, address, offset, kind):
        pointer = self.b.inttoptr(address.ir, I8.as_pointer())
        if isinstance(offset, Value) or offset:
            pointer = self.b.gep(pointer, [self.integer(offset).ir])
        return self.b.bitcast(pointer, kind.as_pointer())

    def _load(self, address, offset, kind):
        value = self.b.load(self._pointer(address, offset, kind))
        value.align = 1  # arrays of the caller may be misaligned, and it costs nothing
        return value

    def load(self, address, offset=0, lanes=W):
        return Value(self, self._load(address, offset, ir.VectorType(self.real, lanes)))

    def scalar(self, address, offset=0):
        return Value(self, self._load(address, offset, self.real))

    def bcast(self, address, offset=0, lanes=W):
        return self.splat(self.scalar(address, offset), lanes)

    def store(self, value, address, offset=0, streaming=False):
        """Write, `streaming` to a multiple of 64 bytes past the caches."""
        store = self.b.store(value.ir, self._pointer(address, offset, value.ir.type))
        store.align = 64 if streaming else 1
        if streaming:
            store.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(I32, 1)]))

    def instruction(self, text, *addresses):
        """Write an instruction that LLVM has no function for; ``$0``, ``$1`` are the addresses."""
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(addresses))
        constraints = ",".join(["r"] * len(addresses) + ["~{memory}"])
        assembly = ir.InlineAsm(kind, text, constraints, side_effect=True)
        self.b.call(assembly, [self.integer(a).ir for a in addresses])

    def prefetch(self, address, write=False, second=False):
        """Bring a line into the first cache, or only as far as the second one."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        pointer = self.b.inttoptr(address.ir, I8.as_pointer())
        options = [ir.Constant(I32, x) for x in (int(write), 2 if second else 3, 1)]
        self.b.call(function, [pointer, *options])

    # ---- dtypes in memory: "float32" "float64" "float16" "bfloat16" ----

    def load_as(self, dtype, address, lanes):
        """Load `lanes` numbers of `dtype` (1: a scalar) and convert them."""
        if dtype == "bfloat16":
            bits = self.b.zext(self._load(address, 0, shape_of(I16, lanes)), shape_of(I32, lanes))
            bits = self.b.shl(bits, constant(I32, lanes, 16))
            return self._convert(self.b.bitcast(bits, shape_of(F32, lanes)), lanes)
        if dtype == "float16" and not CONVERTS_HALF:
            bits = self.b.zext(self._load(address, 0, shape_of(I16, lanes)), shape_of(I32, lanes))
            return self._convert(self._from_half_bits(bits, lanes), lanes)
        return self._convert(self._load(address, 0, shape_of(STORED[dtype], lanes)), lanes)

    def store_as(self, dtype, value, address, lanes):
        """Round `value` to `dtype`, to nearest even, and store it."""
        by_bits = dtype == "bfloat16" or (dtype == "float16" and not CONVERTS_HALF)
        x = resize(self.b, value.ir, shape_of(F32 if by_bits else STORED[dtype], lanes))
        if by_bits:
            x = (self._bfloat16_bits if dtype == "bfloat16" else self._half_bits)(x, lanes)
        self.b.store(x, self._pointer(address, 0, x.type)).align = 1

    def _convert(self, x, lanes):
        return Value(self, resize(self.b, x, shape_of(self.real, lanes)))

    def _bfloat16_bits(self, x, lanes):
        b = self.b
        bits = b.bitcast(x, shape_of(I32, lanes))

        def number(n):
            return constant(I32, lanes, n)

        odd = b.and_(b.lshr(bits, number(16)), number(1))
        rounded = b.lshr(b.add(b.add(bits, odd), number(0x7FFF)), number(16))
        # rounding could carry a NaN into infinity or zero: keep its sign and make it quiet
        nan = b.or_(b.lshr(bits, number(16)), number(0x40))
        return b.trunc(b.select(b.fcmp_unordered("uno", x, x), nan, rounded), shape_of(I16, lanes))

    def _from_half_bits(self, bits, lanes):
        """float32 of the bits of a float16: scaling by 2^112 moves the exponent, denormals too.

        Those are denormals of float32 before: no mode may take what is read for 0.
        """
        b = self.b

        def number(n):
            return constant(I32, lanes, n)

        sign = b.shl(b.and_(bits, number(0x8000)), number(16))
        bits = b.shl(b.and_(bits, number(0x7FFF)), number(13))
        scale = constant(F32, lanes, 2.0**112)
        scaled = b.bitcast(b.fmul(b.bitcast(bits, scale.type), scale), bits.type)
        special = b.icmp_unsigned(">=", bits, number(0x7C00 << 13))
        scaled = b.select(special, b.or_(bits, number(0x7F800000)), scaled)
        return b.bitcast(b.or_(scaled, sign), scale.type)

    def _half_bits(self, x, lanes):
        """Bits of the float16 nearest to a float32."""
        b = self.b

        def number(n):
            return constant(I32, lanes, n)

        bits = b.bitcast(x, shape_of(I32, lanes))
        sign = b.lshr(b.and_(bits, number(0x80000000)), number(16))
        bits = b.and_(bits, number(0x7FFFFFFF))
        # adding 1/2 shifts a number below 2^-14 to the place of a float16 denormal, and rounds
        half = constant(F32, lanes, 0.5)
        small = b.bitcast(b.fadd(b.bitcast(bits, half.type), half), bits.type)
        small = b.sub(small, number(126 << 23))
        odd = b.and_(b.lshr(bits, number(13)), number(1))
        normal = b.sub(b.add(b.add(bits, number(0xFFF)), odd), number(112 << 23))
        normal = b.lshr(normal, number(13))
        large = b.icmp_unsigned(">", bits, number(0x7F800000))
        large = b.select(large, number(0x7E00), number(0x7C00))
        result = b.select(b.icmp_unsigned("<", bits, number(113 << 23)), small, normal)
        result = b.select(b.icmp_unsigned(">=", bits, number(143 << 23)), large, result)
        return b.trunc(b.or_(result, sign), shape_of(I16, lanes))

    # ---- pairs of bfloat16 in the halves of 32-bit words ----

    def load_pairs(self, address):
        """16 numbers of bfloat16 as 8 with even and 8 with odd index: one instruction for each."""
        words = self._load(address, 0, shape_of(I32, 8))
        halves = self._low_half(words, 8), self._high_half(words, 8)
        return [Value(self, self.b.bitcast(x, shape_of(F32, 8))) for x in halves]

    def store_pairs(self, values, address):
        """Round 8 numbers with even and 8 with odd index to bfloat16 and store them.

        A NaN must be one of `load_pairs` or of `plain_nan`: the bits that are cut off are zeros.
        """
        b = self.b
        even, odd = (b.bitcast(x.ir, shape_of(I32, 8)) for x in values)
        kind = shape_of(I16, 16)
        kept = b.or_(b.lshr(even, constant(I32, 8, 16)), self._high_half(odd, 8))
        cut = b.or_(b.and_(even, constant(I32, 8, 0xFFFF)), self._low_half(odd, 8))
        kept, cut = b.bitcast(kept, kind), b.bitcast(cut, kind)
        # up if what is cut off is more than a half, or a half and the kept part is odd
        less = ir.FunctionType(kind, [kind, kind])
        less = cgutils.get_or_insert_function(b.module, less, "llvm.usub.sat.v16i16")
        cut = b.call(less, [cut, b.and_(b.not_(kept), constant(I16, 16, 1))])
        words = b.add(kept, b.lshr(cut, constant(I16, 16, 15)))
        b.store(words, self._pointer(address, 0, kind)).align = 1

    def load_words(self, address, offset=0):
        return Value(self, self._load(address, offset, ir.VectorType(I32, W)))

    def halves(self, x):
        """Round a vector to bfloat16, to nearest."""
        lanes = x.ir.type.count
        if DOTS_BFLOAT16:
            # for such an instruction of its own LLVM 15 calls a function that is nowhere
            kind = ir.FunctionType(ir.VectorType(I16, lanes), [x.ir.type])
            return self.b.call(ir.InlineAsm(kind, "vcvtneps2bf16 $1, $0", "=v,v"), [x.ir])
        return self._bfloat16_bits(x.ir, lanes)

    def load_halves(self, address, offset=0):
        """16 numbers of bfloat16 as they are."""
        return self._load(address, offset, ir.VectorType(I16, W))

    def store_halves(self, halves, address, offset=0):
        self.b.store(halves, self._pointer(address, offset, halves.type)).align = 1

    def from_halves(self, halves):
        lanes = halves.type.count
        bits = self.b.zext(halves, ir.VectorType(I32, lanes))
        bits = self.b.shl(bits, constant(I32, lanes, 16))
        return Value(self, self.b.bitcast(bits, ir.VectorType(F32, lanes)))

    def pair(self, low, high):
        """Round two vectors to bfloat16, to nearest, and join them lane by lane."""
        lanes = low.ir.type.count
        mixed = [i + by for i in range(lanes) for by in (0, lanes)]
        mixed = self.b.shuffle_vector(self.halves(low), self.halves(high), mask_of(mixed))
        return Value(self, self.b.bitcast(mixed, ir.VectorType(I32, lanes)))

    def halves_of(self, words):
        """The two numbers of each word, as two vectors."""
        kind = ir.VectorType(F32, words.ir.type.count)
        bits = self._low_half(words.ir, kind.count), self._high_half(words.ir, kind.count)
        return [Value(self, self.b.bitcast(x, kind)) for x in bits]

    def dot(self, address, offset, words, acc):
        """Add the two products of one word in memory with each of the words to `acc`."""
        if DOTS_BFLOAT16:
            # as an instruction of LLVM the broadcast would stay one of its own
            vector = acc.ir.type
            kind = ir.FunctionType(vector, [vector, words.ir.type, I64])
            text = f"vdpbf16ps {offset}($3){{1to16}}, $2, $0"
            asm = ir.InlineAsm(kind, text, "=v,0,v,r,~{memory}", side_effect=True)
            return Value(self, self.b.call(asm, [acc.ir, words.ir, address.ir]))
        word = self._load(address, offset, I32)
        for half in (self._low_half, self._high_half):
            a = self.splat(Value(self, self.b.bitcast(half(word, 1), F32)))
            b = Value(self, self.b.bitcast(half(words.ir, W), ir.VectorType(F32, W)))
            acc = self.fma(a, b, acc)
        return acc

    def _low_half(self, word, lanes):
        return self.b.shl(word, constant(I32, lanes, 16))

    def _high_half(self, word, lanes):
        return self.b.and_(word, constant(I32, lanes, 0xFFFF0000))

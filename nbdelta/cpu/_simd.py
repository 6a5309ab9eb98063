"""A small emitter of vector code.

`tile` turns a Python function ``f(e, *args)`` into a function that kernels call as ``f(REAL,
*args)``, where ``REAL`` is ``np.float32`` or ``np.float64``. While Numba compiles the kernel,
``f`` runs once with an `Emitter` and writes vector instructions: Python loops in it are unrolled
code, `Emitter.loop` is a loop. Integer arguments are byte addresses and counts, float arguments
are of type ``REAL``.

Addresses instead of arrays keep slicing, bounds and array structs out of the inner loops, and one
compilation serves every array layout. `_emit_memory` and `_emit_numbers` hold the operations,
`_llvm` their types and values, `_vector_unit` what the processor has.
"""

import inspect

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nbdelta.cpu._emit_memory import Memory
from nbdelta.cpu._emit_numbers import Numbers
from nbdelta.cpu._llvm import F32, F64, I32, I64, Value, mask_of
from nbdelta.cpu._llvm import size_of as size_of
from nbdelta.cpu._vector_unit import W, native_lanes, tile_rows


class Emitter(Memory, Numbers):
    """Writes code for one dtype: `size`, `row`: bytes of a number, a row; `lanes` a register."""

    def __init__(self, builder, real):
        self.b = builder
        self.real = F64 if real == types.float64 else F32
        self.size = 8 if real == types.float64 else 4
        self.row = W * self.size
        self.lanes = native_lanes(self.size)
        self.mr = tile_rows(self.size)

    def argument(self, kind, value):
        """Return an argument of a tile as its function takes it."""
        if isinstance(kind, types.NumberClass):
            return "bfloat16" if kind.dtype == types.uint16 else kind.dtype.name
        return Value(self, value)

    # ---- constants ----

    def like(self, value, x):
        """Return the number `x` as a constant of the type of `value`."""
        if isinstance(x, Value):
            return x
        kind = value.ir.type
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [float(x)] * kind.count))
        return Value(self, ir.Constant(kind, x))

    def integer(self, x):
        return x if isinstance(x, Value) else Value(self, ir.Constant(I64, x))

    def splat(self, x, lanes=W):
        """Return a vector with `x`, a number or a float of the code, in every lane."""
        kind = ir.VectorType(self.real, lanes)
        if not isinstance(x, Value):
            return Value(self, ir.Constant(kind, [float(x)] * lanes))
        zero = ir.Constant(kind, ir.Undefined)
        v = self.b.insert_element(zero, x.ir, ir.Constant(I32, 0))
        return Value(self, self.b.shuffle_vector(v, zero, mask_of([0] * lanes)))

    # ---- control ----

    def loop(self, n, carried, body, step=1, maybe_empty=False):
        """Emit ``for i in range(0, n, step): carried = body(i, carried)`` and return the last
        values.

        n is at least 1 unless `maybe_empty` says that this has to be looked at.
        """
        b = self.b
        end = self.integer(n).ir
        before = b.block
        head, done = b.append_basic_block("loop"), b.append_basic_block("done")
        if maybe_empty:
            b.cbranch(b.icmp_signed("<", ir.Constant(I64, 0), end), head, done)
        else:
            b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(ir.Constant(I64, 0), before)
        phis = [b.phi(value.ir.type) for value in carried]
        for phi, value in zip(phis, carried):
            phi.add_incoming(value.ir, before)
        results = body(Value(self, i), [Value(self, phi) for phi in phis])
        following = b.add(i, self.integer(step).ir, flags=("nsw", "nuw"))
        last = b.block
        i.add_incoming(following, last)
        for phi, value in zip(phis, results):
            phi.add_incoming(value.ir, last)
        b.cbranch(b.icmp_signed("<", following, end), head, done)
        b.position_at_end(done)
        if not maybe_empty:
            return results
        merged = []
        for value, result in zip(carried, results):
            phi = b.phi(value.ir.type)
            phi.add_incoming(value.ir, before)
            phi.add_incoming(result.ir, last)
            merged.append(Value(self, phi))
        return merged

    def choose(self, number, emit, n):
        """Run ``emit(i)`` for the i < n that equals `number`, and return its value if it has one.

        A number out of range runs the last one.
        """
        b = self.b
        cases = [b.append_basic_block(f"case{i}") for i in range(n)]
        done = b.append_basic_block("done")
        switch = b.switch(number.ir, cases[-1])
        results = []
        for i, case in enumerate(cases):
            switch.add_case(ir.Constant(I64, i), case)
            b.position_at_end(case)
            results.append((emit(i), b.block))
            b.branch(done)
        b.position_at_end(done)
        if results[0][0] is None:
            return None
        phi = b.phi(results[0][0].ir.type)
        for value, block in results:
            phi.add_incoming(value.ir, block)
        return Value(self, phi)


# annotations of what a tile returns, if anything
REAL = "a float of the code"
INT = "an integer"


def tile(function):
    """Make a kernel function ``f(REAL, *args)`` of an emitter function ``f(e, *args)``.

    The emitter function returns nothing, or what its annotation says, ``-> REAL`` or ``-> INT``.
    An argument that is a NumPy type, as ``np.float16``, arrives as its name; ``np.uint16`` stands
    for bfloat16.
    """
    names = list(inspect.signature(function).parameters)[1:]
    returns = function.__annotations__.get("return")

    def typing(real, args):
        real = real.dtype
        signature = [
            a
            if isinstance(a, types.NumberClass)
            else real
            if isinstance(a, types.Float)
            else types.int64
            for a in args
        ]
        result = {REAL: real, INT: types.int64}.get(returns, types.void)

        def codegen(context, builder, signature, values):
            e = Emitter(builder, real)
            value = function(e, *map(e.argument, signature.args[1:], values[1:]))
            return value.ir if returns else context.get_dummy_value()

        return result(types.NumberClass(real), *signature), codegen

    # intrinsic wants a function with as many named arguments as the call has
    arguments = ", ".join(names)
    source = (
        f"def {function.__name__}(typingctx, real, {arguments}):\n"
        f"    return typing(real, [{arguments}])\n"
    )
    namespace = {"typing": typing}
    exec(compile(source, f"<tile {function.__name__}>", "exec"), namespace)
    made = namespace[function.__name__]
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    return intrinsic(made)


def constant_of(function):
    """Make a kernel function of REAL that is ``function(bytes of REAL)``, known while compiling."""

    def typing(typingctx, real):
        size = real.dtype.bitwidth // 8

        def codegen(context, builder, signature, args):
            return ir.Constant(I64, function(size))

        return types.int64(real), codegen

    return intrinsic(typing)


itemsize = constant_of(lambda size: size)
rows_of_tile = constant_of(tile_rows)
lanes_of = constant_of(native_lanes)


def _rounded_up(multiple_of):
    """Make a kernel function ``f(REAL, n)``: n rounded up to ``multiple_of(bytes of REAL)``."""

    def typing(typingctx, real, n):
        multiple = multiple_of(8 if real.dtype == types.float64 else 4)

        def codegen(context, builder, signature, args):
            last = ir.Constant(I64, multiple - 1)
            return builder.and_(builder.add(args[1], last), ir.Constant(I64, -multiple))

        return types.int64(real, types.int64), codegen

    return intrinsic(typing)


padded = _rounded_up(lambda size: W)
whole_tiles = _rounded_up(tile_rows)

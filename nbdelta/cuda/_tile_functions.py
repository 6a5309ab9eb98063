"""Tile functions: written once, in Python, over a vocabulary, on lists of per-lane values.

The loops in them run while code is made, so everything is unrolled and every register has its
place.
"""

from inspect import Parameter, Signature

import numpy as np
from numba import types

from nbdelta.cuda import _lanes
from nbdelta.cuda._jit import SIMULATOR, intrinsic
from nbdelta.cuda._lanes import Lanes

f32, i32, u32, u64, void = types.float32, types.int32, types.uint32, types.uint64, types.void

# for kernels: the simulator would make NumPy's numbers, which do not mix with wider ones
if SIMULATOR:
    int32, uint32, uint64 = _lanes.int32, _lanes.uint32, _lanes.uint64
else:
    int32, uint32, uint64 = i32, u32, u64


def registers(n, type=f32):
    """Type of a tuple of registers."""
    return types.UniTuple(type, n)


def tile_maker(vocabulary):
    """The decorator of tile functions over a vocabulary, a class that is made of a builder."""

    def tile(result, *operands):
        """Make a tile function callable in kernels.

        The function gets the vocabulary, or its twin in the simulator, and a value for every
        operand, a list of values for a tuple; it returns the same.
        """

        def make(function):
            signature = result(*operands)

            def simulated(*args):
                values = [_simulated_operand(t, x) for t, x in zip(operands, args)]
                with np.errstate(all="ignore"):  # a GPU does not warn
                    out = function(Lanes, *values)
                return tuple(out) if isinstance(out, list) else out

            def codegen(context, builder, signature, args):
                values = [
                    [builder.extract_value(x, i) for i in range(t.count)]
                    if isinstance(t, types.UniTuple)
                    else x
                    for t, x in zip(operands, args)
                ]
                out = function(vocabulary(builder), *values)
                if result == void:
                    return context.get_dummy_value()
                if isinstance(result, types.UniTuple):
                    return context.make_tuple(builder, signature.return_type, out)
                return out

            def typed(typingctx, *args):
                return signature, codegen

            # numba looks at the parameters of what it lowers
            names = ["typingctx", *(f"x{i}" for i in range(len(operands)))]
            kind = Parameter.POSITIONAL_OR_KEYWORD
            typed.__signature__ = Signature([Parameter(name, kind) for name in names])
            typed.__name__ = function.__name__
            return intrinsic(simulated)(typed)

        return make

    return tile


def _simulated_operand(t, x):
    if isinstance(t, types.UniTuple):
        return [_simulated_operand(t.dtype, y) for y in x]
    if t in (f32, types.float64):
        return np.dtype(str(t)).type(x)
    return _lanes.uint64(x) if t == u64 else _lanes.uint32(x)

"""The kernels of the CPU with a clock in them: where their time goes.

Their own source is compiled once more, with two readings of the processor's clock around every
statement whose calls all belong to one stage. So the stages are timed where they work, with the
caches as they are there. The sums are kept in the descriptor, behind what a kernel knows of a call,
and only one thread works.
"""

import ast
import hashlib
import inspect
import sys
import types
from functools import cache, partial
from pathlib import Path

import numpy as np

from nbdelta.cpu import (
    _atomic,
    _call,
    _chunk_panels,
    _chunk_squares,
    _chunk_strips,
    _jit,
    chunk,
    recurrent,
)
from nbdelta.problem import prepare
from nbdelta.structure import Arrays, Options

STAGES = {
    "states in and out": ("load_states", "_store_states", "_load_state", "_store_state"),
    "rows, norms, packing": (
        *("stage_rows", "token_rows", "pack_columns", "pair_rows", "round_rows", "normalise"),
        *("stage", "output_rows", "store_output", "_load_vector", "dot_row", "load_row"),
        *("store_row", "word_columns", "_once"),
    ),
    "gates and their products": (
        *("load_beta", "_load_token_gates", "gate_products", "multiply_row", "fill_row"),
        *("load_tokens", "load_bias", "gate_factor", "apply_gate", "decay_rows", "prefix_tile"),
        *("suffix_tile", "_channel_gates", "_head_gate", "_load_beta"),
    ),
    "Gram matrices k.k and q.k": (
        *("_gram", "_gram_of_pairs", "transpose_tile", "apply_norms", "decay_pairs", "_pairs"),
    ),
    # a matrix unit multiplies K and Q with S at once
    "U = (I + A)^-1 (beta V - beta e^G K S)": ("first_product", "multiply_two"),
    "O = scale (e^G Q S + P U)": ("second_product", "output_reads"),
    "S = e^G_last S + (K e^(G_last - G))^T U": (
        *("third_product", "_update", "finish_updates", "keep_update", "split_words"),
    ),
    "step of the state, and output": ("step", "step_v_first"),
}
_STAGE_OF = {name: i for i, names in enumerate(STAGES.values()) for name in names}
# functions of several stages, which have a clock inside
_LOOKED_INTO = {"key_head", "head_gates", "channel_gates", "value_strips"}
# Counter of a whole kernel, and place of the first one: behind what a kernel on one thread knows.
WHOLE, COUNTERS = len(STAGES), _call.NEXT + 8
_KEY = "clocked", int(hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12], 16)


class _Clocks(ast.NodeTransformer):
    """Puts readings of the clock around statements."""

    def visit_FunctionDef(self, node):
        """Look into what is no stage itself, and time a kernel as a whole as well."""
        if node.name in _STAGE_OF:
            return node
        if "desc" in (argument.arg for argument in node.args.args):
            self.generic_visit(node)
        else:  # one that makes kernels, or has no place for a sum
            node.body = [self.visit(n) if isinstance(n, ast.FunctionDef) else n for n in node.body]
        if any(ast.unparse(d).startswith("kernel(") for d in node.decorator_list):
            node.body = _timed(node.body, WHOLE)
        return node

    def visit(self, node):
        """Time a statement of one stage, or look into it."""
        if isinstance(node, ast.Expr | ast.Assign | ast.For | ast.If) and _leads_on(node):
            calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
            names = {f.id for f in calls if isinstance(f, ast.Name)}
            stages = {_STAGE_OF[name] for name in names & _STAGE_OF.keys()}
            if len(stages) == 1 and not names & _LOOKED_INTO:
                return _timed([node], *stages)
        return super().visit(node)


def _leads_on(node):
    """Whether the statement after this one comes next, whatever happens in it."""
    jumps = ast.Continue | ast.Break | ast.Return
    return not any(isinstance(n, jumps) for n in ast.walk(node))


def _timed(statements, stage):
    (begin,) = ast.parse(f"begin_{stage} = ticks()").body
    (end,) = ast.parse(f"desc[COUNTERS + {stage}] += ticks() - begin_{stage}").body
    return [begin, *statements, end]


def _clocked(module, **names):
    """Return a module with clocks in its kernels, and `names` set in it."""
    tree = _Clocks().visit(ast.parse(inspect.getsource(module)))
    made = types.ModuleType(f"{module.__name__}_clocked")
    sys.modules[made.__name__] = made  # where Numba looks when it loads a kernel from its cache
    code = compile(ast.fix_missing_locations(tree), module.__file__, "exec")
    made.__dict__.update(ticks=_atomic.ticks, COUNTERS=COUNTERS)
    exec(code, made.__dict__)
    made.__dict__.update(kernel=partial(_jit.kernel, *_KEY), run=_run_alone, **names)
    return made


@cache
def _rooms():
    rooms = {"panels": _clocked(_chunk_panels), "strips": _clocked(_chunk_strips)}
    rooms["squares"] = _clocked(_chunk_squares)
    return _clocked(chunk, **rooms), _clocked(recurrent)


_counters = np.zeros(WHOLE + 1, np.int64)


def _run_alone(kernel, desc, items, scratch_bytes, *_, **__):
    """Run a kernel on this thread, as `nbdelta.cpu._team.run` does on several."""
    whole = np.zeros(COUNTERS + WHOLE + 1, np.int64)
    whole[: _call.NEXT] = desc[: _call.NEXT]
    scratch = np.empty(scratch_bytes + 64, np.uint8)
    address = scratch.ctypes.data
    whole[_call.WORKERS], whole[_call.ITEMS] = 1, items
    whole[_call.SCRATCH] = address + -address % 64
    kernel(whole.ctypes.data, 0)
    _counters[:] = whole[COUNTERS:]


def clocked_call(inputs, prefill):
    """Make a call of a kernel with a clock.

    Parameters
    ----------
    inputs : dict
        Arrays of `nbdelta.gated_delta_rule` by name; q and k are normalised, the final states
        returned.
    prefill : bool
        Whether the chunked kernel runs, or the recurrent one, on the states in place.

    Returns
    -------
    function
        Without arguments; returns the ticks of the whole kernel, and the part of them that each
        stage of `STAGES` took.
    """
    rooms = _rooms()
    arrays = [inputs.get(name) for name in Arrays._fields]
    options = dict.fromkeys(Options._fields, False)
    options.update(dict.fromkeys(("lower_bound", "chunk_size", "precision", "checkpoint_interval")))
    options.update(
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        inplace_final_state=not prefill,
        head_order="interleaved",
    )
    options = [None, *Options(**options)]  # no scale

    def call():
        problem = prepare(arrays, options)
        if prefill:
            rooms[0].chunk_gated_delta_rule(problem)
        else:
            rooms[1].fused_recurrent_gated_delta_rule(problem)
        if not _counters[WHOLE]:
            raise RuntimeError("no clock that a program may read is known for this processor")
        return int(_counters[WHOLE]), tuple(_counters[:WHOLE] / _counters[WHOLE])

    return call

"""The package from outside: names, signatures, docstrings, what an import costs."""

import ast
import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import nbdelta
from nbdelta import ops

PACKAGE = pathlib.Path(nbdelta.__file__).parent
RULES = (
    "gated_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_kda",
)
BACKWARD = "chunk_gated_delta_rule_bwd"
BLOCKS = ("chunk_local_cumsum", "solve_tril", "solve_triangular", "fused_gate")
POSITIONAL = (
    *("q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state"),
    "use_qk_l2norm_in_kernel",
)
COMMON = {
    *("use_gate_in_kernel", "A_log", "dt_bias", "lower_bound", "use_beta_sigmoid_in_kernel"),
    *("allow_neg_eigval", "state_v_first", "cu_seqlens", "head_order", "precision"),
    *("checkpoint_interval", "out"),
}
POOL = {"state_indices", "num_accepted_tokens", "inplace_final_state"}


def parameters(name, kind):
    signature = inspect.signature(getattr(nbdelta, name))
    return tuple(p.name for p in signature.parameters.values() if p.kind is kind)


def test_exports():
    assert sorted(nbdelta.__all__) == sorted((*RULES, BACKWARD, *BLOCKS))
    public = {n for n in vars(nbdelta) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(nbdelta, n))}
    assert public - modules == set(nbdelta.__all__)
    assert nbdelta.__version__ == "0.1.0"
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", RULES)
def test_signature_of_rules(name):
    only = COMMON | (POOL if name.startswith("fused_recurrent") else {"chunk_size"})
    assert parameters(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) == POSITIONAL
    assert set(parameters(name, inspect.Parameter.KEYWORD_ONLY)) == only
    defaults = inspect.signature(getattr(nbdelta, name)).parameters
    assert [p for p in POSITIONAL if defaults[p].default is inspect.Parameter.empty] == [
        *("q", "k", "v", "g", "beta")
    ]


def test_signature_of_the_backward_pass():
    options = [p for p in POSITIONAL[5:] if p != "output_final_state"]
    forward = (*POSITIONAL[:5], "do", "dht", *options)
    assert parameters(BACKWARD, inspect.Parameter.POSITIONAL_OR_KEYWORD) == forward
    only = COMMON - {"checkpoint_interval", "out"}
    assert set(parameters(BACKWARD, inspect.Parameter.KEYWORD_ONLY)) == only


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        (
            "chunk_local_cumsum",
            "(x, chunk_size, *, axis=1, reverse=False, scale=None, cu_seqlens=None, out=None)",
        ),
        ("solve_tril", "(A, *, cu_seqlens=None, out=None)"),
        ("solve_triangular", "(L, b, *, unit_diagonal=False, out=None)"),
        ("fused_gate", "(x, A_log=None, dt_bias=None, *, lower_bound=None)"),
    ],
)
def test_signature_of_blocks(name, signature):
    own = inspect.signature(getattr(nbdelta, name))
    bare = own.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in own.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == signature


@pytest.mark.parametrize("name", nbdelta.__all__)
def test_no_keyword_is_swallowed(name):
    function = getattr(nbdelta, name)
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.Parameter.VAR_POSITIONAL not in kinds


@pytest.mark.parametrize("name", nbdelta.__all__)
def test_docstring_is_the_signature(name):
    function = getattr(nbdelta, name)
    doc = inspect.getdoc(function)
    sections = dict(re.findall(r"^(\w+)\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", doc, re.S | re.M))
    assert set(sections) == {"Parameters", "Returns", "Raises", "Notes", "Examples"}
    names = [
        n
        for line in re.findall(r"^(\S.*?) : ", sections["Parameters"], re.M)
        for n in line.split(", ")
    ]
    assert sorted(names) == sorted(inspect.signature(function).parameters)
    assert set(re.findall(r"\d{4}\.\d{5}", doc)) == {"2412.06464", "2510.26692", "2406.06484"}


@pytest.mark.parametrize("name", nbdelta.__all__)
def test_docstring_example_runs(name):
    tests = doctest.DocTestFinder().find(getattr(nbdelta, name), name, globs={})
    runner = doctest.DocTestRunner()
    for test in tests:
        assert test.examples
        runner.run(test)
    assert runner.summarize().failed == 0


def test_annotations_are_complete():
    for name in nbdelta.__all__:
        function = getattr(ops, name)
        assert set(function.__annotations__) == {*inspect.signature(function).parameters, "return"}


def test_import_is_light():
    code = (
        "import sys, nbdelta; print(nbdelta.__file__); "
        "print([m for m in ('torch', 'numba.cuda', 'rich', 'ml_dtypes', 'cupy', 'transformers') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path, loaded = run.stdout.split("\n")[:2]
    assert pathlib.Path(path).parent == PACKAGE
    assert loaded == "[]"


def test_modules_are_imported_when_used():
    code = (
        "import sys, nbdelta; "
        "print([n for n in ('naive', 'torch', 'transformers') if f'nbdelta.{n}' in sys.modules]); "
        "print(nbdelta.naive.solve_tril.__module__, nbdelta.transformers.enable.__module__); "
        "print(hasattr(nbdelta, 'no_such_thing'), 'torch' in sys.modules, nbdelta.torch.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "[]",
        "nbdelta.naive nbdelta.transformers",
        "False False nbdelta.torch",
    ]


def test_only_jit_modules_call_numba():
    """Anything that compiles goes through the one place that states every option."""
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_jit.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = (node.value.id, node.attr)
                if name in {(m, f) for m in ("numba", "cuda", "nb") for f in ("njit", "jit")}:
                    offenders.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba":
                if {"njit", "jit"} & {a.name for a in node.names}:
                    offenders.append(f"{path.name}:{node.lineno}")
    assert offenders == []

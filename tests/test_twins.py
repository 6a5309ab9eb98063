"""The two rooms are twins: ``cpu/`` and ``cuda/`` hold the same, and each tool has one place."""

import ast
from functools import cache
from pathlib import Path

import pytest

import nbdelta

PACKAGE = Path(nbdelta.__file__).parent
CPU, CUDA = PACKAGE / "cpu", PACKAGE / "cuda"
STAGES = sorted(p.name for p in CPU.glob("[!_]*.py"))


@cache
def tree(path):
    return ast.parse(path.read_text())


def python_files(*apart_from):
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p not in apart_from]


def host_functions(path):
    """Signatures of the functions behind the public ones."""
    return {
        node.name: ast.unparse(node.args)
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef) and node.name in nbdelta.__all__
    }


def imports(path):
    """Dotted names of all that a file imports, wherever the statement stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(paths, package):
    """Files that import a package, or something out of it."""
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in paths
        for name in imports(path)
        if f"{name}.".startswith(f"{package}.")
    ]


def calls_of(path, names):
    """Lines where a function of one of these names is referred to, as ``a.name`` or ``name``."""
    return [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.Name) and node.id in names)
    ]


def test_same_files():
    assert sorted(p.name for p in CUDA.glob("[!_]*.py")) == STAGES


@pytest.mark.parametrize("name", STAGES)
def test_same_host_functions(name):
    functions = host_functions(CPU / name)
    assert functions, "a stage file without a host function"
    assert host_functions(CUDA / name) == functions


def test_every_public_function_has_a_host_function_or_a_name_for_one():
    found = set().union(*(host_functions(CPU / name) for name in STAGES))
    # gated_delta_rule picks one of the others, and the KDA names are the rules' own
    assert found == set(nbdelta.__all__) - {"gated_delta_rule", "chunk_kda", "fused_recurrent_kda"}


def test_rooms_do_not_know_each_other():
    assert offenders(CPU.glob("*.py"), "nbdelta.cuda") == []
    assert offenders(CUDA.glob("*.py"), "nbdelta.cpu") == []


def test_numba_cuda_stays_in_its_room():
    outside = [p for p in python_files() if CUDA not in p.parents]
    assert offenders(outside, "numba.cuda") == []


def test_code_is_emitted_in_few_places():
    """Assembly has one file in each room, LLVM IR those that say what memory and numbers are."""
    assembly = [CPU / "_emit_memory.py", CUDA / "_ptx.py"]
    names = (
        "_atomic.py",
        "_descriptor.py",
        "_float_mode.py",
        "_machine_code.py",
        "_vector_unit.py",
    )
    emitters = [CPU / name for name in names]
    emitters += [*assembly, *(CPU / f"{name}.py" for name in ("_simd", "_llvm", "_emit_numbers"))]
    emitters += [CUDA / name for name in ("_memory.py", "_shared.py", "_state.py", "_step.py")]
    # the CPU's features and versions that `info` prints are questions to llvmlite
    others = python_files(*emitters, PACKAGE / "info.py")
    assert offenders(others, "llvmlite") == []
    assert offenders(others, "numba.extending") == []
    assert [
        line for path in python_files(*assembly) for line in calls_of(path, {"InlineAsm"})
    ] == []


def test_compilation_has_one_place():
    """Every option of the compilers is in ``_jit.py``."""
    others = python_files(CPU / "_jit.py", CUDA / "_jit.py")
    for package in ("numba.njit", "numba.jit", "numba.cuda.jit"):
        assert offenders(others, package) == []
    compilers = ("numba.njit", "numba.jit", "cuda.jit")
    attributes = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in others
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in compilers
    ]
    assert attributes == []

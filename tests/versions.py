"""Try the oldest and the newest versions that pyproject.toml admits; prints a row of a table each.

    pip install uv
    python tests/versions.py --python python3.11 --python python3.13

Each environment is made from wheels alone, and has all extras that the tests need: with PyTorch's
default build, which brings CUDA, that is 8 GB. It is made anew in a temporary folder, or kept in
one that --folder names, where parts can be run one after the other:

    python tests/versions.py --only newest --folder kept tests/test_torch.py
    python tests/versions.py --only newest --folder kept tests/test_solve.py check

The last output belongs into docs/reliability.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("numba", "numpy", "torch", "transformers")
# what leans on other packages the most: compilation, arrays in and out, models; and all algorithms
TESTS = [
    "tests/test_arrays.py",
    "tests/test_torch.py",
    "tests/test_solve.py",
    "tests/test_chunk_local_cumsum.py",
    "tests/test_chunk_gated_delta_rule.py",
    "tests/test_fused_recurrent.py",
    "tests/test_backward.py::test_options",
    "tests/test_transformers.py::test_logits_agree",
    "tests/test_transformers.py::test_disable_restores_everything",
]
CHECK = "check"  # `python -m nbdelta check`
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
LIST = """
import importlib.metadata, json, platform
versions = {name: importlib.metadata.version(name) for name in %r}
print(json.dumps({"Python": platform.python_version(), **versions}))
"""


def uv(*arguments):
    subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], check=True)


def outcome(command, environment):
    """Run a command in the checkout; return how it ended, and say more where it failed."""
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-4000:], run.stderr[-4000:], file=sys.stderr)
    return run.returncode, (run.stdout.strip().splitlines() or [""])[-1]


def make(folder, python, resolution):
    """Make an environment, unless it is there."""
    own = str(folder / "bin" / "python")
    if (folder / "made").exists():
        return own
    uv("venv", "--quiet", "--clear", "--python", python, folder)
    uv(
        *("pip", "install", "--quiet", "--python", own, "--only-binary", ":all:"),
        *("--resolution", RESOLUTIONS[resolution], "-r", ROOT / "pyproject.toml"),
        *("--extra", "test"),
    )
    (folder / "made").touch()
    return own


def row(folder, python, resolution, parts):
    """Run parts of the tests in an environment, and print its row of the table."""
    own = make(folder, python, resolution)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": str(folder / "kernels"),
    }
    listed = subprocess.run(
        [own, "-c", LIST % (SHOWN,)], check=True, capture_output=True, text=True
    )
    versions = json.loads(listed.stdout)
    failed, unfit, cells = 0, 0, [resolution, *versions.values(), "", ""]
    if tests := [part for part in parts if part != CHECK]:
        pytest = [own, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests]
        failed, last = outcome(pytest, environment)
        cells[-2] = last.strip("= ")
    if CHECK in parts:
        unfit, _ = outcome([own, "-m", "nbdelta", "check"], environment)
        cells[-1] = "failed" if unfit else "passed"
    print("| " + " | ".join(cells) + " |", flush=True)
    return bool(failed or unfit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    parser.add_argument("--only", choices=RESOLUTIONS, help="one of the two")
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    parser.add_argument("parts", nargs="*", default=[*TESTS, CHECK], help="of the tests, or check")
    options = parser.parse_args()
    print("| versions | Python | " + " | ".join(SHOWN) + " | tests | `nbdelta check` |")
    print("|---" * (len(SHOWN) + 4) + "|", flush=True)
    failures = 0
    for python in options.python or [sys.executable]:
        for resolution in [options.only] if options.only else RESOLUTIONS:
            with tempfile.TemporaryDirectory() as temporary:
                name = f"{Path(python).parent.parent.name}-{Path(python).name}-{resolution}"
                folder = options.folder / name if options.folder else Path(temporary)
                failures += row(folder.absolute(), python, resolution, options.parts)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())

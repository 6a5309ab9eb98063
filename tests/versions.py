"""Try the oldest and the newest versions that pyproject.toml admits; prints a row of a table each.

    pip install uv
    python tests/versions.py --python python3.11 --python python3.13

Each environment is made anew in a temporary folder, from wheels alone, and has all extras that the
tests need: with PyTorch's default build, which brings CUDA, that is 8 GB. The last output belongs
into docs/reliability.md.
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


def row(folder, python, resolution):
    """Make an environment, run the tests in it, and return its row of the table."""
    uv("venv", "--quiet", "--clear", "--python", python, folder)
    own = str(folder / "bin" / "python")
    uv(
        *("pip", "install", "--quiet", "--python", own, "--only-binary", ":all:"),
        *("--resolution", RESOLUTIONS[resolution], "-r", ROOT / "pyproject.toml"),
        *("--extra", "test"),
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": str(folder / "kernels"),
    }
    listed = subprocess.run(
        [own, "-c", LIST % (SHOWN,)], check=True, capture_output=True, text=True
    )
    versions = json.loads(listed.stdout)
    pytest = [own, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *TESTS]
    failed, tests = outcome(pytest, environment)
    unfit, _ = outcome([own, "-m", "nbdelta", "check"], environment)
    cells = [*versions.values(), tests.strip("= "), "failed" if unfit else "passed"]
    print("| " + " | ".join([resolution, *cells]) + " |", flush=True)
    return bool(failed or unfit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", help="an interpreter; may be repeated")
    parser.add_argument("--only", choices=RESOLUTIONS, help="one of the two")
    options = parser.parse_args()
    print("| versions | Python | " + " | ".join(SHOWN) + " | tests | `nbdelta check` |")
    print("|---" * (len(SHOWN) + 4) + "|", flush=True)
    failures = 0
    for python in options.python or [sys.executable]:
        for resolution in [options.only] if options.only else RESOLUTIONS:
            with tempfile.TemporaryDirectory() as folder:
                failures += row(Path(folder), python, resolution)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())

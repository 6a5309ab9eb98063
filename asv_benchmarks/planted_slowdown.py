"""Shows that the history notices a slowdown of 20 % and nothing where nothing changed.

In a clone in a temporary folder, measures HEAD, a commit without changes, and one whose prefill
takes a fifth longer, in turns, and prints what ``asv compare`` makes of the least figures. Needs
the packages of ``nbdelta[bench]``, and ten minutes in which the machine has nothing else to do.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# on one thread: a product on all cores is at the mercy of whatever else runs
BENCHMARKS = r"Prefill\.track_over_floor\('cpu-1-thread.*(512|2k)"
ROUNDS = 5  # what slows a machine down for minutes is not taken for a commit's
HOST = Path("nbdelta/cpu/chunk.py")
PLANTED = """
_right = start


def start(job, desc):
    from time import perf_counter

    begin = perf_counter()
    _right(job, desc)
    end = perf_counter()
    while perf_counter() < end + 0.2 * (end - begin):
        pass
"""


def main():
    """Measure and compare."""
    repository = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", repository, clone], check=True)
        commits = [_commit(clone, "as it is"), _commit(clone, "the same again")]
        with (clone / HOST).open("a") as file:
            file.write(PLANTED)
        commits.append(_commit(clone, "a fifth slower"))
        _asv(clone, "machine", "--machine", "here", "--yes")
        least = {}
        for _ in range(ROUNDS):
            for commit in commits:
                _git(clone, "checkout", "-q", commit)
                options = "--python=same", "--set-commit-hash", commit, "--machine", "here"
                _asv(clone, "run", *options, "--bench", BENCHMARKS)
                _keep_least(clone, commit, least)
        for commit, what in zip(commits[1:], ("nothing changed", "a fifth slower"), strict=True):
            print(f"\n{what}:", flush=True)
            _asv(clone, "compare", "--machine", "here", commits[0], commit)


def _keep_least(clone, commit, least):
    """Let asv's file of a commit have the least figures of all rounds so far."""
    (file,) = (clone / "asv_benchmarks/results/here").glob(f"{commit[:8]}-*.json")
    kept = json.loads(file.read_text())
    for name, (figures, *_) in kept["results"].items():
        before = least.get((commit, name), figures)
        pairs = zip(figures, before)  # None, or no number: what was left out
        figures[:] = [x if x is None else min(x, y) for x, y in pairs]
        least[commit, name] = list(figures)
    file.write_text(json.dumps(kept))


def _asv(clone, *arguments):
    environment = {**os.environ, "ASV_PYTHONPATH": str(clone)}
    command = [sys.executable, "-m", "asv", *arguments]
    subprocess.run(command, cwd=clone / "asv_benchmarks", env=environment, check=True)


def _git(clone, *arguments):
    command = ["git", "-C", clone, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _commit(clone, message):
    """Commit what has changed, or nothing, and return the hash."""
    author = "-c", "user.name=asv", "-c", "user.email=asv@localhost"
    _git(clone, *author, "commit", "-q", "--all", "--allow-empty", "-m", message)
    return _git(clone, "rev-parse", "HEAD")


if __name__ == "__main__":
    main()

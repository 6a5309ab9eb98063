"""Every example runs, each in a process of its own as a reader would start it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--dim", "64", "--layers", "1", "--batch", "4", "--length", "96", "--generate", "20"]


def run(name, folder, *options):
    """Run an example in a folder, and return what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *options],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()


def test_all_examples_are_tested():
    tested = {"quickstart.py", "generate.py", "train_language_model.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(tmp_path):
    assert run("quickstart.py", tmp_path) == "(1, 100, 4, 96) (1, 4, 64, 96) True\n"


def test_generate(tmp_path):
    pytest.importorskip("transformers")
    printed = run("generate.py", tmp_path)
    assert re.search(r"^generated \[\d+(, \d+){19}\]$", printed, re.MULTILINE)
    assert printed.endswith("the same as without nbdelta: True\n")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"the number %d comes after %d. " % (i + 1, i) for i in range(900)))
    return path


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_train_language_model(tmp_path, text, gate):
    for package in ("torch", "rich", "safetensors", "matplotlib"):
        pytest.importorskip(package)
    printed = run(
        "train_language_model.py", tmp_path, *TINY, "--gate", gate, "--text", text,
        "--steps", "100", "--plot", "loss.png", "--checkpoint", "model",
    )  # fmt: skip
    unigram, bigram = (
        float(re.search(rf"{x} ([\d.]+)", printed)[1]) for x in ("unigram", "bigram")
    )
    held_out = [
        float(x) for x in re.findall(r"^ +\d+ +[\d.]+ +([\d.]+) +\d+$", printed, re.MULTILINE)
    ]
    assert len(held_out) == 10
    assert held_out[-1] < bigram < unigram < held_out[0]
    assert "differ by" in printed
    assert "ok\n" in printed
    # 100 bytes of the text and the 20 that were generated from the file
    written = printed.split("ms each:\n\n")[1].replace("\n", "")
    assert len(written) == 120
    assert (tmp_path / "model").stat().st_size > 100_000
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_torch_backend_learns_the_same(tmp_path, text):
    pytest.importorskip("transformers")
    losses = []
    for backend in ("nbdelta", "torch"):
        printed = run(
            "train_language_model.py", tmp_path, *TINY, "--text", text, "--steps", "3",
            "--backend", backend,
        )  # fmt: skip
        losses.append(re.findall(r"^ +\d+ +([\d.]+) +([\d.]+) +\d+$", printed, re.MULTILINE))
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]

"""The command line, in this process; once as a process of its own."""

import re
import subprocess
import sys

import numpy as np
import pytest

import nbdelta
from nbdelta import check, cli, info, warmup

pytest.importorskip("rich")
TINY = ["--tokens", "40", "--new-tokens", "3", "--layers", "2", "--hidden-size", "64"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def small_check(monkeypatch):
    """Fewer tokens: the reference is slow."""
    monkeypatch.setattr(check, "_SIZES", {"B": 2, "T": 20, "H": 1, "HV": 2, "K": 17, "V": 5})
    monkeypatch.setattr(check, "_HARD", ("gate -inf", "gates mixed"))


def test_as_a_process():
    command = [sys.executable, "-m", "nbdelta"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"nbdelta {nbdelta.__version__}\n"
    none = subprocess.run(command, capture_output=True, text=True, check=False)
    assert none.returncode == 2
    assert "COMMAND" in none.stderr


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("nbdelta", "numba", "numpy", "CPU features", "threads", "cache", "CUDA"):
        assert re.search(rf"^ *{name} +\S", text, re.MULTILINE), name
    assert np.__version__ in text
    assert "unknown" not in text


def test_info_survives_what_it_cannot_find_out(monkeypatch, capsys):
    def fail():
        raise OSError("no such thing")

    monkeypatch.setattr(info, "_cpu", fail)
    assert cli.main(["info"]) == 0
    assert "unknown (OSError: no such thing)" in capsys.readouterr().out


def test_info_names_the_forced_cpu(monkeypatch, capsys):
    import numba

    monkeypatch.setattr(numba.config, "CPU_NAME", "haswell")
    assert cli.main(["info"]) == 0
    assert "haswell (NUMBA_CPU_NAME" in capsys.readouterr().out


def test_check(small_check, capsys):
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    for name in nbdelta.__all__:
        assert f" {name} " in text
    for part in ("float32", "float64", "float16", "bfloat16", "GDA", "KDA", "within their bounds"):
        assert part in text
    assert "MISS" not in text


@pytest.mark.parametrize("value", [np.nan, 1e-2], ids=["nan", "inexact"])
def test_check_notices_a_wrong_function(small_check, monkeypatch, capsys, value):
    right = nbdelta.chunk_gated_delta_rule

    def wrong(*args, **kwargs):
        o, *rest = right(*args, **kwargs)
        o[0, -1, -1, -1] += value
        return o, *rest

    monkeypatch.setattr(nbdelta, "chunk_gated_delta_rule", wrong)
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    missed = [line.split()[0] for line in text.splitlines() if "MISS" in line]
    assert set(missed) == {"chunk_gated_delta_rule"}
    assert f"{len(missed)} of " in text


def test_check_notices_a_function_that_fails(small_check, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("out of order [N]")

    monkeypatch.setattr(nbdelta, "chunk_kda", fail)
    assert cli.main(["check"]) == 1
    assert "ZeroDivisionError: out of order [N]" in capsys.readouterr().out


def test_check_of_a_device_that_is_not_served(capsys):
    assert cli.main(["check", "--device", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().out


def test_warmup(monkeypatch, capsys):
    assert cli.main(["warmup"]) == 0
    calls = len(list(warmup._calls()))
    assert f"{calls} calls ready" in capsys.readouterr().out


def test_bench(monkeypatch, capsys):
    pytest.importorskip("threadpoolctl")
    from nbdelta import bench

    cases = [bench._Case("gda", 1, 1, 64, 1.25), bench._Case("kda", 1, 1, 1, 2.3)]
    monkeypatch.setattr(bench, "_cases", lambda threads: cases)
    monkeypatch.setattr(bench, "_peak", lambda seconds: 1e11)
    monkeypatch.setattr(bench, "_stream", lambda size, seconds: 1e-4)
    monkeypatch.setattr(bench, "_best", lambda call, seconds: call() and 2e-4)
    monkeypatch.setattr(bench, "_blocks", lambda peak, seconds: [])
    monkeypatch.setattr(bench, "HV", 2)
    bench._decode_floor.cache_clear()
    assert cli.main(["bench", "--quick", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "prefill GDA, T = 64" in text
    assert re.search(r"decode KDA, B = 1 +0.200 +0.100 +2.00 +2.30", text)


@pytest.fixture
def without_torch_threads():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    kept = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == kept


@pytest.mark.parametrize("model", ["qwen3-next", "kimi-linear"])
def test_demo(model, tmp_path, capsys, without_torch_threads):
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 10)
    arguments = ["demo", "--model", model, "--text", str(text), "--threads", "1", *TINY]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "40 bytes as tokens, 3 more generated; 1 thread" in shown
    assert len(re.findall(r"[\d.]+ +[\d.]+ +[\d.]+ x", shown)) == 4
    assert "same tokens generated: yes ok" in shown


def test_demo_notices_wrong_logits(monkeypatch, capsys, without_torch_threads):
    right = nbdelta.gated_delta_rule

    def wrong(*args, **kwargs):
        o, state = right(*args, **kwargs)
        return o * 1.01, state * 1.01

    monkeypatch.setattr(nbdelta, "gated_delta_rule", wrong)
    assert cli.main(["demo", *TINY]) == 1
    assert "MISS" in capsys.readouterr().out


def test_demo_without_a_text(tmp_path, capsys, without_torch_threads):
    assert cli.main(["demo", "--text", str(tmp_path / "missing")]) == 2
    (tmp_path / "empty").touch()
    assert cli.main(["demo", "--text", str(tmp_path / "empty")]) == 2
    assert "empty" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "info", "check", "bench", "warmup"])
def test_a_missing_package_is_said(command, monkeypatch, capsys):
    # `need` imports by name, so a hole in the table of modules is what it sees
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main([command]) == 2
    error = capsys.readouterr().err
    assert f"{command} needs rich" in error
    assert "pip install 'nbdelta[demo]'" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--tokens", "0"],
        ["demo", "--layers", "1"],
        ["demo", "--model", "other"],
        ["bench", "--threads", "100000"],
        ["demo", "--threads", "0"],
        ["nothing"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert arguments[1:2] == [] or arguments[1] in capsys.readouterr().err


def test_the_package_needs_none_of_it():
    heavy = "{'rich', 'torch', 'transformers', 'ml_dtypes'}"
    code = f"import sys, nbdelta; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

"""The command line, in this process; once as a process of its own."""

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import nbdelta
from nbdelta import (
    bench,
    bench_clock,
    bench_peers,
    bench_quick,
    bench_training,
    check,
    cli,
    explain,
    explain_clock,
    info,
    shapes,
    warmup,
)
from nbdelta.cpu import _chunk_panels, _chunk_squares, _chunk_strips, chunk, recurrent

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


def test_info_shows_long_paths_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(info, "_cache", lambda: "/folder" * 30)
    assert cli.main(["info"]) == 0
    assert "/folder" * 30 in re.sub(r"\s", "", capsys.readouterr().out)


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


@pytest.fixture
def short_bench(monkeypatch):
    """The clock runs for a moment, on few and small shapes."""
    pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(bench, "LENGTHS", (20,))
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    cases = [(model, 20) for model, _ in bench_training.CASES]
    monkeypatch.setattr(bench_training, "CASES", cases)
    monkeypatch.setattr(bench_training, "SECONDS", 0.0)
    monkeypatch.setattr(bench_quick, "SECONDS", 0.0)
    monkeypatch.setattr(bench_clock, "TURN", 0.0)
    monkeypatch.setattr(bench_clock, "PAUSE", 0.0)
    monkeypatch.setattr(bench_clock, "ROUNDS", 1)
    monkeypatch.setattr(bench_clock, "SIDE", 64)
    monkeypatch.setattr(bench_clock, "STREAM", 1024)
    monkeypatch.setattr(bench_quick, "ROWS", 64)
    monkeypatch.setattr(bench_quick, "_first_call", lambda T: 0.5)
    layers = {"qwen3-next": ("gda", 1, 2, 32, 32), "kimi-linear": ("kda", 2, 2, 32, 32)}
    for name, sizes in layers.items():
        monkeypatch.setitem(shapes.LAYERS, name, shapes.Layer(*sizes))


def test_bench_quick(short_bench, monkeypatch, capsys):
    times = {"call": bench_clock.Times(3e-4, 4e-4, 9), "floor": bench_clock.Times(2e-4, 3e-4, 9)}
    called = []

    def race(calls, seconds):
        for call in calls.values():
            call()
        called.append(calls)
        return times

    monkeypatch.setattr(bench_clock, "race", race)
    assert cli.main(["bench", "--quick", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "prefill GDA, T = 64" in text
    # the floor of a decode step is one multiply of the states
    assert re.search(r"decode KDA, B = 1 +0.300 +0.200 +1.50 *\n", text)
    assert re.search(r"forward \+ backward GDA.* +1.50 +3.20", text)
    assert len(called) == len(bench_quick._rows(1))


def test_bench_beside_peers(short_bench, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--threads", "1", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "prefill GDA, 1 key and 2 value heads of 32, float32, 1 thread" in text
    found = json.loads(file.read_text())
    assert [(row["gate"], row["B"], row["T"]) for row in found["rows"]] == [
        ("gda", 1, 20), ("kda", 1, 20), ("gda", 1, 1), ("gda", 2, 1), ("kda", 1, 1), ("kda", 2, 1)
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["floor_ms"] > 0
        for result in row["contenders"].values():
            assert result["difference"] < 1e-5
            assert 0 < result["min_ms"] <= result["median_ms"]
    assert "GFLOP/s" in found["about"]["limits, 1 thread"]
    if importlib.util.find_spec("transformers"):
        assert [row["gate"] for row in found["training"]] == ["gda", "kda"]
        for row in found["training"]:
            assert row["difference"] < 1e-5
            assert row["min_ms"].keys() == {"nbdelta", "torch"}


def test_bench_does_not_time_wrong_gradients(short_bench, monkeypatch, capsys):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    grad = torch.autograd.grad
    wrong = iter([1.0, 1.01] * 4)  # of transformers, the second one asked

    def scaled(*args):
        factor = next(wrong)
        return [factor * x for x in grad(*args)]

    monkeypatch.setattr(torch.autograd, "grad", scaled)
    monkeypatch.setattr(bench_peers, "contenders", lambda _: [bench_peers.Nbdelta()])
    assert cli.main(["bench", "--threads", "1"]) == 1
    assert "results differ in 2 cases" in capsys.readouterr().out


def test_bench_does_not_time_wrong_results(short_bench, monkeypatch, tmp_path, capsys):
    class Wrong(bench_peers.Nbdelta):
        name = "torch"

        def results(self, result):
            o, state = super().results(result)
            return o, state + 1e-2

    monkeypatch.setattr(bench_peers, "contenders", lambda _: [bench_peers.Nbdelta(), Wrong()])
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--threads", "1", "--json", str(file)]) == 1
    assert "differs" in capsys.readouterr().out
    assert "min_ms" not in json.loads(file.read_text())["rows"][0]["contenders"]["torch"]


def test_bench_draws(short_bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "made" / "plots"
    assert cli.main(["bench", "--threads", "1", "--plot", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"prefill.png", "decode.png", "speed_up.png"}
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("layer", "T", "stages"),
    [("qwen3-next", 64, 7), ("kimi-linear", 64, 7), ("kimi-linear", 1, 4)],
    ids=["gda", "kda", "decode"],
)
def test_explain(short_bench, monkeypatch, capsys, layer, T, stages):
    monkeypatch.setattr(explain, "SECONDS", 0.0)
    assert cli.main(["explain", "--shape", layer, "--T", str(T), "--B", "2"]) == 0
    text = capsys.readouterr().out
    assert f"B = 2, T = {T}, float32" in text
    table = text.partition("where the time goes")[2]
    rows = re.findall(r"^ +(\S.*?) {2,}([\d.]+) +([\d.]+)", table, re.MULTILINE)
    *shares, rest, whole = (float(share) for _, _, share in rows)
    assert len(shares) == stages
    assert all(share > 0 for share in shares)
    # nothing is counted twice, and what is not counted is shown
    assert sum(shares) < 100
    assert sum(shares) + rest == pytest.approx(whole, abs=0.1 * len(rows))
    assert sum(shares) > 50


def test_explain_leaves_out_calls_whose_clock_went_back():
    calls = [(5, (0.5, -0.1)), (6, (0.8, 0.3)), (8, (0.6, 0.2)), (7, (0.7, 0.2))]
    assert explain._quickest(calls) == (0.7, 0.2)
    assert explain._quickest(calls[:2]) == (0.5, -0.1)


def test_stages_name_what_the_kernels_call():
    sources = (chunk, recurrent, _chunk_panels, _chunk_strips, _chunk_squares)
    calls = {
        node.func.id
        for module in sources
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert explain_clock._STAGE_OF.keys() <= calls
    assert explain_clock._LOOKED_INTO <= calls


def test_race_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench_clock.race(calls, 0.0, timer=lambda call: call() or len(order))
    turns = [name for i, name in enumerate(order) if order[i - 1 : i] != [name]]
    assert turns == list("ab") * (bench_clock.ROUNDS + 1)
    assert times["a"].calls + times["b"].calls == len(order) - 2
    assert times["a"].min == 3


def test_a_gpu_that_is_not_there(capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", ["demo", "info", "check", "bench", "explain", "warmup"])
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
        ["bench", "--device", "other"],
        ["bench", "--quick", "--device", "cuda"],
        ["bench", "--quick", "--json", "numbers.json"],
        ["bench", "--quick", "--plot", "plots"],
        ["explain", "--shape", "other"],
        ["explain", "--T", "0"],
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

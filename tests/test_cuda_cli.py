"""``check`` and ``bench`` for a GPU, on one or on the emulator of one."""

import importlib.machinery
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from emulated_torch import serve_torch

import nbdelta
from nbdelta import bench, bench_clock, bench_peers, check, cli, shapes

pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


# the compilers take seconds for every dtype and gate
SLICES = [("float32", "gda"), ("bfloat16", "kda"), ("float64", "blocks")]


@pytest.mark.parametrize(("dtype", "part"), SLICES)
def test_check(device, monkeypatch, capsys, dtype, part):
    """Slices of it at small sizes on the emulator."""
    if device != "emu":
        pytest.skip("the emulator of a GPU: --device emu")
    monkeypatch.setattr(check, "_DTYPES", (dtype,))
    monkeypatch.setattr(check, "_PARTS", (part,))
    monkeypatch.setattr(check, "_SIZES", {"B": 2, "T": 20, "H": 1, "HV": 2, "K": 17, "V": 5})
    monkeypatch.setattr(check, "_LENGTHS", np.array([0, 1, 16, 3]))
    monkeypatch.setattr(check, "_HARD", ("gates mixed",))
    assert_all_right(capsys, len(nbdelta.__all__) // 3)


def test_whole_check(device, capsys):
    if device != "gpu":
        pytest.skip("minutes on an emulator: a GPU, --device gpu")
    assert_all_right(capsys, len(nbdelta.__all__))


def assert_all_right(capsys, functions):
    assert cli.main(["check", "--device", "cuda"]) == 0
    text = capsys.readouterr().out
    assert sum(f" {name} " in text for name in nbdelta.__all__) >= functions
    assert "within their bounds" in text and "MISS" not in text


@pytest.fixture
def short_bench(device, monkeypatch):
    """The command on CPU tensors that count as CUDA tensors; fewer calls and smaller ones."""
    if device != "emu":
        pytest.skip("tensors get memory of the emulator: --device emu")
    pytest.importorskip("torch")
    pytest.importorskip("threadpoolctl")
    serve_torch(monkeypatch)
    for name, value in (("LENGTHS", (20, 40)), ("BATCHES", (1, 2)), ("SECONDS", 0.0)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "FLUSHED", 1024)
    for name, value in (("TURN", 0.0), ("PAUSE", 0.0), ("ROUNDS", 1)):
        monkeypatch.setattr(bench_clock, name, value)
    layers = {"qwen3-next": ("gda", 1, 2, 32, 32), "kimi-linear": ("kda", 2, 2, 32, 32)}
    for name, sizes in layers.items():
        monkeypatch.setitem(shapes.LAYERS, name, shapes.Layer(*sizes))


class Fla:
    """Stands in for flash-linear-attention: one function after the other goes wrong."""

    def __init__(self, monkeypatch):
        self.heads = []  # of q and of v
        gda, kda = ("gated_delta_rule", "kda")
        modules = {name: ModuleType(name) for name in ("fla", "fla.ops")}
        for module, names in (
            (gda, ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")),
            (kda, ("chunk_kda", "fused_recurrent_kda")),
        ):
            own = modules[f"fla.ops.{module}"] = ModuleType(module)
            for name in names:
                setattr(own, name, self.function(getattr(nbdelta, name)))
        for name, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    def function(self, right):
        def call(**arguments):
            self.heads.append((arguments["q"].shape[2], arguments["v"].shape[2]))
            o, state = right(**arguments)
            if right.__name__ == "chunk_kda":
                raise NotImplementedError("no such tile [64]")
            return (o, state + 1) if right.__name__ == "fused_recurrent_kda" else (o, state)

        call.__doc__ = None if right.__name__.startswith("chunk") else "v: [B, T, HV, V]"
        return call


def test_bench(short_bench, monkeypatch, tmp_path, capsys):
    """Beside a peer of which one function fails and another one is wrong; both are said."""
    fla, file = Fla(monkeypatch), tmp_path / "bench.json"
    arguments = ["bench", "--device", "cuda", "--json", str(file), "--plot", str(tmp_path)]
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert "prefill GDA, 1 key and 2 value heads of 32, bfloat16, 1 thread" in text
    assert "fla fails: NotImplementedError('no such tile [64]')" in text
    assert "results differ in 2 cases" in text
    assert "GPU: an emulated GPU" in text
    # of the one function that knows of grouped heads, and of one that does not
    assert (1, 2) in fla.heads and (2, 2) in fla.heads
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        ours, theirs = row["contenders"]["nbdelta"], row["contenders"].get("fla", {})
        assert row["floor_ms"] > 0 and 0 < ours["min_ms"] <= ours["median_ms"]
        if row["gate"] == "gda":
            assert theirs["difference"] == 0 and theirs["min_ms"] > 0
        else:
            assert "min_ms" not in theirs
    found = [(row["gate"], row["B"], row["T"], "fla" in row["contenders"]) for row in rows]
    assert found == [
        ("gda", 1, 20, True), ("gda", 1, 40, True), ("kda", 1, 20, True), ("kda", 1, 40, False),
        ("gda", 1, 1, True), ("gda", 2, 1, True), ("kda", 1, 1, True), ("kda", 2, 1, False),
    ]  # fmt: skip
    assert (tmp_path / "prefill.png").exists()


def test_bench_without_peers(short_bench, monkeypatch, capsys):
    monkeypatch.setattr(bench_peers, "FlashLinearAttention", fail)
    assert cli.main(["bench", "--device", "cuda"]) == 0
    assert "contenders: nbdelta\n" in capsys.readouterr().out


def fail():
    raise ImportError("fla")

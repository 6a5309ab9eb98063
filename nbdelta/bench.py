"""``python -m nbdelta bench``: nbdelta beside the peers that are installed, on the same inputs.

For each shape the results are compared, then the calls take turns, and with them the floor: the
least that this machine could take, see `nbdelta.bench_quick`. On a GPU the floor is a copy of as
many bytes as the call must read and write.
"""

import json
import subprocess
from pathlib import Path

import numpy as np

from nbdelta import bench_clock as clock
from nbdelta import bench_peers as peers
from nbdelta import bench_plots as plots
from nbdelta import bench_training as training
from nbdelta import console as out
from nbdelta.cpu._team import thread_count
from nbdelta.info import report
from nbdelta.shapes import LAYERS
from nbdelta.testing import make_inputs, rel_l2

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("qwen3-next", "kimi-linear")
SECONDS = 2.0
# a peer whose call took longer is left out of the longer ones
PATIENCE = 2.0
# bytes written before every call on a GPU: more than any cache on one holds, and so many that all
# kernels of the call have been asked for when the clock starts
FLUSHED = 2**31
# of a head's results, relative, to those of nbdelta
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}
_ABOUT = ("nbdelta", "Python", "numba", "numpy", "torch", "transformers", "CPU", "vectors", "CUDA")


def bench(device="cpu", threads=None, json_file=None, plot_folder=None):
    """Print the tables.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        Where the calls run.
    threads : int, optional
        Of the calls on the CPU; ``None`` is one, and then all.
    json_file, plot_folder : str, optional
        Where to write the numbers and the pictures.

    Returns
    -------
    int
        0, or 1 when results differ.
    """
    console = out.console("bench")
    if plot_folder:
        out.need("matplotlib", "bench --plot", "nbdelta[bench]")
    place = Cuda() if device == "cuda" else Cpu()
    rivals = peers.contenders(device)
    counts = sorted({1, thread_count()}) if threads is None else [threads]
    series = [
        ([LAYERS[model].shape(*size) for size in sizes], count)
        for sizes in ([(1, T) for T in LENGTHS], [(B, 1) for B in BATCHES])
        for model in MODELS
        for count in (counts if device == "cpu" else [1])
    ]
    rows = []
    with out.progress(console, sum(len(shapes) for shapes, _ in series)) as step:
        for shapes, count in series:
            with clock.limited_to(count, "bench"):
                made = _series(shapes, count, place, rivals, step)
            console.print(_table(made, rivals))
            rows += made
    trained = _training(console, counts[-1]) if device == "cpu" else []
    about = {**_about(rivals), **place.limits(counts)}
    found = {"about": about, "rows": rows, "training": trained}
    for name, value in found["about"].items():
        console.print(out.plain(f"{name}: {value}"))
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
    if plot_folder:
        for path in plots.draw(found, plot_folder):
            console.print(out.plain(f"written: {path}"))
    wrong = [row for row in rows for c in row["contenders"].values() if not c["agrees"]]
    wrong += [row for row in trained if not row["agrees"]]
    for name, error in _errors(rows):
        console.print(out.plain(f"{name} fails: {error}"))
    if wrong:
        console.print(f"{out.verdict(False)}: results differ in {len(wrong)} cases")
    return 1 if wrong else 0


def _errors(rows):
    """Contenders that failed and what they said, each sentence once."""
    results = [pair for row in rows for pair in row["contenders"].items()]
    return dict.fromkeys((name, c["error"]) for name, c in results if "error" in c)


def _training(console, threads):
    """Time forward and backward passes where there is someone to compare with."""
    with clock.limited_to(threads, "bench"), out.progress(console, len(training.CASES)) as step:
        rows = training.rows(threads, step)
    if rows:
        console.print(training.table(rows))
    return rows


class Cpu:
    """float32 on some threads."""

    dtype, timer = "float32", staticmethod(clock.wall_time)

    def floor(self, shape):
        """Return a call, and how many of it the floor is."""
        if shape.T == 1:
            return clock.Multiply(shape.state_size), 1
        product = clock.MatrixProduct()
        return product, shape.flops / product.flops

    def limits(self, counts):
        """Measure the machine's limits on some numbers of threads."""
        found = {}
        for count in counts:
            with clock.limited_to(count, "bench"):
                calls = {"product": clock.MatrixProduct(), "stream": clock.Multiply(clock.STREAM)}
                times = clock.race(calls, SECONDS)
            flops = calls["product"].flops / times["product"].min
            stream = calls["stream"].bytes / times["stream"].min
            name = f"limits, {count} thread{'s' if count > 1 else ''}"
            found[name] = (
                f"matrix product {flops / 1e9:.0f} GFLOP/s, "
                f"reading and writing {stream / 1e9:.1f} GB/s"
            )
        return found


class Cuda:
    """bfloat16 in device memory, timed by events after the caches were overwritten."""

    dtype = "bfloat16"

    def __init__(self):
        self.torch = out.need("torch", "bench --device cuda")
        if not self.torch.cuda.is_available():
            raise out.MissingPackage("bench --device cuda needs a GPU that torch can use")
        self.cache = self.torch.empty(FLUSHED // 4, dtype=self.torch.float32, device="cuda")

    def timer(self, call):
        """Seconds on the device, without what lies in its cache."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def floor(self, shape):
        """Return a copy of as many bytes as the call reads and writes."""
        moved = shape.token_bytes(size=2) + 2 * 4 * shape.state_size
        source = self.torch.empty(moved // 2, dtype=self.torch.int8, device="cuda")
        target = self.torch.empty_like(source)
        return lambda: target.copy_(source), 1

    def limits(self, counts):
        """Return the card's name."""
        return {"GPU": self.torch.cuda.get_device_name()}


def _series(shapes, threads, place, rivals, step):
    """Rows of one gate; who needs too long at one size is not asked for the next."""
    rows, rivals = [], list(rivals)
    for shape in shapes:
        step(f"{_name(shape)}, {threads} thread{'s' if threads > 1 else ''}", 0)
        rows.append(_row(shape, threads, place, rivals))
        took = rows[-1]["contenders"]
        rivals = [r for r in rivals if r.name == "nbdelta" or _in_time(took[r.name])]
        step("")
    return rows


def _in_time(result):
    return result["agrees"] and result["min_ms"] < 1e3 * PATIENCE


def _name(shape):
    size = f"B = {shape.B}" if shape.T == 1 else f"T = {shape.T}"
    return f"{'decode' if shape.T == 1 else 'prefill'} {shape.gate.upper()}, {size}"


def _row(shape, threads, place, rivals):
    """Compare, then time; what is wrong is not timed."""
    inputs = make_inputs(
        0,
        *shape[1:],
        gate=shape.gate,
        dtype=place.dtype,
        states=shape.B,
        # of the inputs' dtype in no model: states are kept in float32
        state_dtype="float32",
    )
    calls, contenders, expected = {}, {}, None
    for rival in rivals:
        try:
            call = rival.prepare(shape, inputs, threads)
            got = [np.array(x, np.float32) for x in rival.results(call())]
        except Exception as error:  # of a peer: the others go on
            if expected is None:
                raise
            contenders[rival.name] = {"agrees": False, "error": repr(error)}
            continue
        expected = expected or got
        difference = max(rel_l2(got[0], expected[0]), rel_l2(got[1], expected[1], head_axis=1))
        agrees = bool(difference < LARGEST_DIFFERENCE[place.dtype])
        contenders[rival.name] = {"difference": difference, "agrees": agrees}
        if agrees:
            calls[rival.name] = call
    floor, factor = place.floor(shape)
    times = clock.race({**calls, "floor": floor}, SECONDS, place.timer)
    for name in calls:
        best, median, count = times[name]
        contenders[name].update(min_ms=1e3 * best, median_ms=1e3 * median, calls=count)
    return {
        "name": _name(shape),
        **shape._asdict(),
        "dtype": place.dtype,
        "threads": threads,
        "floor_ms": 1e3 * factor * times["floor"].min,
        "contenders": contenders,
    }


def _table(rows, rivals):
    """Return a table of a series: milliseconds, least and median, and what nbdelta saves."""
    first, threads = rows[0], rows[0]["threads"]
    decode = first["T"] == 1
    others = [r.name for r in rivals if r.name != "nbdelta"]
    columns = [">B" if decode else ">T", ">floor", ">nbdelta", ">/ floor"]
    for name in others:
        columns += [f">{name}", ">x"]
    table = out.table(
        f"{first['name'].partition(',')[0]}, {first['H']} key and {first['HV']} value heads of "
        f"{first['K']}, {first['dtype']}, {threads} thread{'s' if threads > 1 else ''}: "
        "ms, least / median",
        *(*columns, ">difference"),
    )
    for row in rows:
        ours = row["contenders"]["nbdelta"]
        cells = [str(row["B"] if decode else row["T"]), _ms(row["floor_ms"]), _pair(ours)]
        cells.append(f"{ours['min_ms'] / row['floor_ms']:.2f}")
        for name in others:
            theirs = row["contenders"].get(name)
            if theirs is None:
                cells += ["-", ""]
            elif not theirs["agrees"]:
                cells += ["fails" if "error" in theirs else "differs", ""]
            else:
                cells += [_pair(theirs), f"{theirs['min_ms'] / ours['min_ms']:.1f}"]
        largest = max(c.get("difference", 0.0) for c in row["contenders"].values())
        table.add_row(*cells, f"{largest:.0e}")
    return table


def _ms(x):
    """Three digits."""
    return f"{x:.{max(0, 2 - int(np.floor(np.log10(x))))}f}" if x < 100 else f"{x:.0f}"


def _pair(result):
    return f"{_ms(result['min_ms'])} / {_ms(result['median_ms'])}"


def _about(rivals):
    """Hardware, versions and commit."""
    found = {name: value for name, value in report() if name in _ABOUT}
    found["contenders"] = ", ".join(rival.name for rival in rivals)
    found["llama-cpp-python"] = peers.version("llama-cpp-python")
    found["flash-linear-attention"] = peers.version("flash-linear-attention")
    found["commit"] = _commit()
    return {name: value for name, value in found.items() if value}


def _commit():
    """Return the commit of a checkout, with a plus if files were changed since; else None."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()

"""Pictures of ``python -m nbdelta bench``, by matplotlib."""

from pathlib import Path

COLOURS = {"nbdelta": "#d1495b", "torch": "#30638e", "ggml": "#edae49", "fla": "#00798c"}
GATES = ("gda", "kda")


def draw(found, folder):
    """Write the pictures, of the largest number of threads.

    Parameters
    ----------
    found : dict
        What ``bench --json`` writes.
    folder : str
        Made if it is not there.

    Returns
    -------
    list of Path
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(row["threads"] for row in found["rows"])
    rows = [row for row in found["rows"] if row["threads"] == threads]
    title = f"{found['about'].get('GPU') or found['about'].get('CPU', '')}, {rows[0]['dtype']}" + (
        "" if "GPU" in found["about"] else f", {threads} thread{'s' if threads > 1 else ''}"
    )
    return [
        _save(_times(rows, "T", title), folder / "prefill.png"),
        _save(_times(rows, "B", title), folder / "decode.png"),
        _save(_speed_ups(rows, title), folder / "speed_up.png"),
    ]


def _save(figure, path):
    figure.savefig(path, dpi=120)
    return path


def _figure(title, rows=1):
    # not pyplot, which may want a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4 * rows), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, 2, sharey=True).flat


def _of(rows, size, gate):
    """Rows of a gate, decode (size B) or prefill (T)."""
    return [row for row in rows if row["gate"] == gate and (row["T"] == 1) == (size == "B")]


def _times(rows, size, title):
    """Draw times over T or B, with the floor as a line."""
    figure, panels = _figure(title)
    for axes, gate in zip(panels, GATES):
        some = _of(rows, size, gate)
        sizes = [row[size] for row in some]
        floor = [row["floor_ms"] for row in some]
        axes.plot(sizes, floor, "--", color="black", linewidth=1, label="floor of this machine")
        for name, points in _by_contender(some, size).items():
            axes.plot(*zip(*points), "o-", color=COLOURS[name], markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel("sequences of one token" if size == "B" else "tokens")
        axes.set_title(f"{'decode' if size == 'B' else 'prefill'}, {gate.upper()}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylabel("milliseconds a layer, least")
        axes.legend(fontsize=8)
    return figure


def _by_contender(rows, size):
    """Return (size, least milliseconds) of each contender."""
    points = {}
    for row in rows:
        for name, result in row["contenders"].items():
            if result["agrees"]:
                points.setdefault(name, []).append((row[size], result["min_ms"]))
    return points


def _speed_ups(rows, title):
    """Draw bars: the peers' times over that of nbdelta."""
    figure, panels = _figure(title, rows=2)
    kinds = [(size, gate) for size in "TB" for gate in GATES]
    for axes, (size, gate) in zip(panels, kinds):
        some = _of(rows, size, gate)
        names = [name for name in _by_contender(some, size) if name != "nbdelta"]
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            results = [row["contenders"].get(name, {}) for row in some]
            ours = [row["contenders"]["nbdelta"]["min_ms"] for row in some]
            bars = axes.bar(
                [j + (i + 0.5) * width - 0.4 for j in range(len(some))],
                [r.get("min_ms", 0) / t for r, t in zip(results, ours)],
                *(width, 0),
                color=COLOURS[name],
                label=name,
            )
            labels = [f"{bar.get_height():.1f}" if bar.get_height() else "" for bar in bars]
            axes.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
        axes.margins(y=0.2)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_xticks(range(len(some)), [str(row[size]) for row in some], fontsize=8)
        axes.set_xlabel("sequences of one token" if size == "B" else "tokens")
        axes.set_title(f"{'decode' if size == 'B' else 'prefill'}, {gate.upper()}", fontsize=10)
        if names:
            axes.legend(fontsize=8)
        axes.set_ylabel("time over that of nbdelta")
    return figure

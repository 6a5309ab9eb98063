"""The command line: ``python -m nbdelta demo | info | check | bench | explain | warmup``."""

import argparse
import sys
from contextlib import contextmanager

import nbdelta
from nbdelta.console import MissingPackage
from nbdelta.shapes import LAYERS


def main(argv=None):
    """Run a command.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; those of the process when ``None``.

    Returns
    -------
    int
        Exit code: 0, 1 when what was checked is wrong, 2 when the command could not run.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _expect_none_ignored(parser, options)
    try:
        with _threads(parser, getattr(options, "threads", None)):
            return options.run(options)
    except MissingPackage as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m nbdelta",
        description="Kernels for the gated delta rule: see them work, check and time them.",
    )
    parser.add_argument("--version", action="version", version=f"nbdelta {nbdelta.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, description):
        made = commands.add_parser(name, help=description, description=description)
        made.set_defaults(run=run)
        return made

    demo = command(
        "demo",
        _demo,
        "Prefill a text and generate with a model of transformers, with and without nbdelta.",
    )
    demo.add_argument("--model", choices=["qwen3-next", "kimi-linear"], default="qwen3-next")
    demo.add_argument("--text", metavar="FILE", help="text to read (default: Python's help texts)")
    demo.add_argument(
        "--tokens",
        type=_positive,
        metavar="N",
        help="length of the prefill, a token is a byte (default: 1024, kimi-linear: 192)",
    )
    demo.add_argument("--new-tokens", type=_positive, default=16, metavar="N")
    demo.add_argument("--layers", type=_at_least_two, default=4, metavar="N")
    demo.add_argument("--hidden-size", type=_positive, default=256, metavar="N")
    demo.add_argument("--seed", type=int, default=0)

    command("info", _info, "Versions, what the kernels use of this machine, cache, CUDA.")

    check = command(
        "check", _check, "Compare every function with the float64 reference on this machine."
    )
    check.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    check.add_argument("--seed", type=int, default=0)

    bench = command(
        "bench",
        _bench,
        "Time nbdelta beside the peers that are installed, and against this machine's limits.",
    )
    bench.add_argument(
        "--quick", action="store_true", help="nbdelta's own table of limits and bars"
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    bench.add_argument("--json", metavar="FILE", help="write the numbers")
    bench.add_argument("--plot", metavar="FOLDER", help="draw them as PNG (needs matplotlib)")

    explain = command(
        "explain", _explain, "Work, floor and time of one layer, and where the time goes."
    )
    explain.add_argument("--shape", choices=LAYERS, default="qwen3-next")
    explain.add_argument("--T", type=_positive, default=2048, metavar="N", help="tokens; 1: decode")
    explain.add_argument("--B", type=_positive, default=1, metavar="N", help="sequences")

    command("warmup", _warmup, "Compile the kernels into the cache, so that later calls are quick.")

    for made in (demo, bench, explain):
        made.add_argument("--threads", type=_positive, metavar="N", help="default: all cores")
    return parser


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a positive number is needed, got {number}")
    return number


def _at_least_two(text):
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"two layers are the least, one of linear and one of full attention, got {number}"
        )
    return number


def _expect_none_ignored(parser, options):
    """Refuse what ``bench --quick`` would ignore."""
    if getattr(options, "quick", False):
        for name, default in (("device", "cpu"), ("json", None), ("plot", None)):
            if getattr(options, name) != default:
                parser.error(f"--quick: prints a table of the CPU's, got --{name} as well")


@contextmanager
def _threads(parser, threads):
    """Hold the kernels to a number of threads."""
    if threads is None:
        yield
        return
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if threads > most:
        parser.error(f"--threads: at most {most} here (NUMBA_NUM_THREADS), got {threads}")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


# the commands are imported when they run: none of them is needed by another


def _demo(options):
    from nbdelta.demo import demo

    return demo(options)


def _info(options):
    from nbdelta.info import info

    return info()


def _check(options):
    from nbdelta.check import check

    return check(options.device, options.seed)


def _bench(options):
    if options.quick:
        from nbdelta.bench_quick import quick

        return quick()
    from nbdelta.bench import bench

    return bench(options.device, options.threads, options.json, options.plot)


def _explain(options):
    from nbdelta.explain import explain

    return explain(options.shape, options.B, options.T)


def _warmup(options):
    from nbdelta.warmup import warmup

    return warmup()

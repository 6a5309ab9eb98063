"""What the commands print with: tables and a progress bar, by rich."""

import importlib
from contextlib import contextmanager


class MissingPackage(Exception):
    """A command needs a package that the library itself does not."""


def need(package, command, install="nbdelta[demo]"):
    """Import a package that only a command needs, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackage(
            f"{command} needs {package} ({error}). Install it with: pip install '{install}'"
        ) from error


def console(command):
    """Return a rich console for standard output."""
    return need("rich.console", command).Console(highlight=False)


def table(title, *columns):
    """Return an empty table; a column that starts with ``>`` is aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        right = column.startswith(">")
        # folded, not cut: a path that lacks its end is of no use
        justify = "right" if right else "left"
        made.add_column(column.lstrip(">"), justify=justify, overflow="fold")
    return made


@contextmanager
def progress(console, total):
    """Show a progress bar while the block runs; yields ``step(text, done=1)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # no refreshing thread: on two cores it slows down what is timed by up to 40 %
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def step(text, done=1):
            bar.update(task, description=text, advance=done, refresh=True)

        yield step


def plain(text):
    """Return text that may hold square brackets, which rich would take for markup."""
    from rich.text import Text

    return Text(text)


def verdict(good):
    """Return the word for a table."""
    return "[green]ok[/]" if good else "[bold red]MISS[/]"

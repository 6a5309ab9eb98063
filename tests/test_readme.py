"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from nbdelta import naive

README = (Path(__file__).parents[1] / "README.md").read_text()


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def quickstart():
    """Names of the ten-line example after it ran, and what it printed."""
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(python_blocks()[0], names)
    return names, printed.getvalue()


def test_ten_lines_print_what_stands_below_them():
    shown = re.search(r"```python\n.*?```\n\n```\n(.*?)```", README, re.S).group(1)
    printed = quickstart()[1]
    numbers = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    assert numbers.sub("#", printed) == numbers.sub("#", shown)
    values, expected = (np.array(numbers.findall(x), float) for x in (printed, shown))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.parametrize("head", [0, 3])
def test_the_equivalent_lines(head):
    names, _ = quickstart()
    q, k = (names[x][0, :, head // 2].astype(float) for x in "qk")
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    v, g, beta = (names[x][0, :, head].astype(float) for x in ("v", "g", "beta"))
    o = np.zeros_like(v)
    space = {"np": np, "q": q, "k": k, "v": v, "g": g, "beta": beta, "o": o, "scale": 64**-0.5}
    exec(python_blocks()[1], {**space, "K": 64, "V": 96, "T": len(q)})
    np.testing.assert_allclose(names["o"][0, :, head], o, rtol=1e-4, atol=1e-6)


def test_the_error_shown_is_the_error_raised():
    names, _ = quickstart()
    call, message = re.search(r">>> (nbdelta.*)\nValueError: (.*)\n", README).groups()
    with pytest.raises(ValueError, match=re.escape(message)):
        exec(call, names)


def test_the_function_table_names_what_exists():
    import nbdelta

    table = README.split("## Functions")[1].split("Conventions")[0]
    named = set(re.findall(r"`(\w+)(?:\(|`)", table)) & set(dir(naive))
    assert set(nbdelta.__all__) <= named

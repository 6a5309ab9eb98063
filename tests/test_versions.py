"""The versions that pyproject.toml admits are those that docs/reliability.md says were tried."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from versions import RESOLUTIONS, SHOWN

ROOT = Path(__file__).parents[1]


def rows():
    """Rows of the table, by the names of its columns."""
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    table = [[x.strip() for x in line.strip("|").split("|")] for line in lines if "|" in line]
    heads = [i for i, row in enumerate(table) if row[:2] == ["versions", "Python"]]
    assert len(heads) == 1
    found = [dict(zip(table[heads[0]], row)) for row in table[heads[0] + 2 :]]
    return [row for row in found if row["versions"] in RESOLUTIONS]


def admitted():
    """What pyproject.toml admits, by package and for Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = map(Requirement, project["dependencies"] + extras["demo"])
    specifiers = {r.name: r.specifier for r in found if r.name in SHOWN}
    assert sorted(specifiers) == sorted(SHOWN)
    return {"Python": SpecifierSet(project["requires-python"]), **specifiers}


def test_what_was_tried_is_admitted():
    tried = rows()
    assert {row["versions"] for row in tried} == set(RESOLUTIONS)
    for row in tried:
        for name, specifier in admitted().items():
            assert row[name] in specifier, row


def test_the_floors_were_tried():
    """On the oldest Python; newer ones need newer packages."""
    first = next(row for row in rows() if row["versions"] == "oldest")
    for name, specifier in admitted().items():
        (floor,) = [x.version for x in specifier if x.operator == ">="]
        floor, had = Version(floor).release, Version(first[name]).release
        assert had[: len(floor)] == floor, name

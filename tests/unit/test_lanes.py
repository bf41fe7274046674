"""Which tests run when: the fast lane, and parts of the full one."""

import re

import pytest
from support.lanes import PARTS, Lane, UnknownPartError
from support.repository import REPOSITORY


@pytest.mark.parametrize(
    ("parts", "named", "taken"),
    [
        ("", False, [None]),
        ("", True, [None, "faults", "slurm"]),
        ("slurm", False, ["slurm"]),
        ("slurm, faults", False, ["faults", "slurm"]),
        ("slurm", True, ["slurm"]),
        ("all", False, [None, "faults", "slurm"]),
    ],
)
def test_a_lane_takes_its_tests(parts, named, taken):
    assert [part for part in (None, "faults", "slurm") if Lane(parts, named).takes(part)] == taken


def test_a_part_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UnknownPartError, match=r"no part \['slrum'\]; it has .*slurm.* and all"):
        Lane("slrum", False)


def test_every_part_has_tests_and_is_explained():
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert set(re.findall(r'mark\.full\("(\w+)"\)', tests)) == PARTS.keys()
    explained = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert [part for part in PARTS if f"| `{part}` |" not in explained] == []

"""Every text family of transformers is exact or refused when it is loaded; none trips later."""

from dataclasses import astuple

import pytest

from benchmarks import families

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def documented():
    lines = families.PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {tuple(cell.strip() for cell in row[:4]) for row in cells[1:]}


@pytest.mark.parametrize("family, kind", families.families())
def test_a_family_trains_if_it_is_not_refused_as_the_table_says(family, kind, documented):
    rows = list(families.examined(family, kind))  # raises if a guard trips in training
    assert {astuple(row)[:4] for row in rows} <= documented


@pytest.mark.parametrize("family, kind", [pair for pair in families.families() if "causal" in pair])
def test_nor_does_a_family_trip_that_learns_to_write(family, kind, documented):
    """Packed rows only where the table has them: what mixes tokens is no matter of the task."""
    for row in families.examined(family, kind, "sft"):
        assert row.verdict != "exact, packed" or astuple(row)[:4] in documented


def test_at_least_sixty_families_are_examined(documented):
    assert len({family for family, _, _, verdict in documented if verdict != "not built"}) >= 60

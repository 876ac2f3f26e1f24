"""``data.partition``: what is understood, and what each scheme needs."""

import pytest

from fedlora.config.schemes import parse
from fedlora.errors import InputError


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("iid", ("iid", "")),
        ("dirichlet:0.5", ("dirichlet", "0.5")),
        ("natural:who: exactly", ("natural", "who: exactly")),
        ("pathological:2", ("pathological", "2")),
    ],
)
def test_a_partition_has_a_scheme_and_its_argument(spec: str, parsed: tuple[str, str]) -> None:
    assert parse(spec, institutions=3, has_classes=True) == parsed


@pytest.mark.parametrize(
    "spec",
    [
        *("random", "iid:3", "natural", "natural:", "size:linear"),
        *("dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf"),
        *("dirichlet:x", "pathological", "pathological:0", "pathological:1.5", "pathological:²"),
    ],
)
def test_any_other_partition_is_refused_with_the_list_of_valid_ones(spec: str) -> None:
    with pytest.raises(InputError, match=f"data.partition is {spec!r}; it must be iid, dirichlet"):
        parse(spec, institutions=3, has_classes=True)


@pytest.mark.parametrize("spec", ["dirichlet:1", "pathological:2"])
def test_classes_are_dealt_out_only_where_there_are_some(spec: str) -> None:
    with pytest.raises(InputError, match="assigns classes, but model"):
        parse(spec, institutions=3, has_classes=False)

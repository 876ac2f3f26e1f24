"""Every text family of transformers is exact or refused when it is loaded; none trips later."""

import pytest

from benchmarks import families

pytestmark = pytest.mark.slow
VERDICTS = {"exact, packed", "exact, padded", "refused", "not built"}


@pytest.mark.parametrize("task", ["classification", "sft"])
@pytest.mark.parametrize("family, kind", families.families())
def test_a_family_is_exact_or_refused_when_it_is_loaded(family, kind, task):
    if task == "sft" and kind != "causal":
        pytest.skip("an encoder writes nothing")
    rows = list(families.examined(family, kind, task))  # raises if a guard trips in training
    assert rows and {row.verdict for row in rows} <= VERDICTS


def test_most_families_can_be_trained():
    built = [family for family, _ in families.families()]
    assert len(built) >= 60

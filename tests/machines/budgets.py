"""How long state machines are searched: a fixed budget in `make test`, a long one for `slow`.

The fixed budget draws the same programs every time. The long one draws others every time, keeps the
failing ones in ``.hypothesis`` and tries them first. Both print a failing program as the calls that
make it: with the mending, those calls become a test in ``test_found.py``.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from fedlora.errors import Refusal

KEPT = Path(__file__).parents[2] / ".hypothesis" / "examples"


def searched(*, fixed: tuple[int, int], long: tuple[int, int]) -> pytest.MarkDecorator:
    """Parametrise a test with ``budget``: (programs, most steps of one), and those of `slow`."""
    common = settings(
        deadline=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    brief = settings(
        common,
        max_examples=fixed[0],
        stateful_step_count=fixed[1],
        derandomize=True,
        database=None,
    )
    whole = settings(
        common,
        max_examples=long[0],
        stateful_step_count=long[1],
        derandomize=False,
        database=DirectoryBasedExampleDatabase(KEPT),
    )
    return pytest.mark.parametrize(
        "budget",
        [pytest.param(brief, id="fixed"), pytest.param(whole, id="long", marks=pytest.mark.slow)],
    )


def search(machine: type[RuleBasedStateMachine], budget: settings, **world: Any) -> None:
    """Run a machine in a world through its budget."""
    run_state_machine_as_test(within(machine, **world), settings=budget)


def within(machine: type[RuleBasedStateMachine], **world: Any) -> type[RuleBasedStateMachine]:
    """The machine with what its programs work on as class attributes."""
    return type(machine.__name__, (machine,), world)


def finds(machine: type[RuleBasedStateMachine], **world: Any) -> None:
    """Assert that a machine fails within 300 programs, as it must with a fault in what it tests."""
    budget = settings(
        max_examples=300,
        stateful_step_count=40,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    # flaky: two processes that race do not fail in the same way twice; ValueError and
    # FileNotFoundError: a torn or missing file; RuntimeWarning: a number beyond its type
    found = (AssertionError, Refusal, ValueError, Flaky, FileNotFoundError, RuntimeWarning)
    with pytest.raises(found):
        search(machine, budget, **world)

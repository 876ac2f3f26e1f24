"""An order that no update can answer, or that asks for too much, is refused and costs nothing."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client import checks, config_policy
from client.institution import Institution
from client.ledger import Ledger
from client.settings import Settings
from fedlora.config.config import from_flat
from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.data import records
from fedlora.errors import InputError, Refusal
from fedlora.models import adapters, trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting, composition
from fedlora.privacy.budget import plan_run
from fedlora.secure import noise_shares
from tests.samples import train_order

ALL = adapters.PARTS


@pytest.fixture
def bank(tiny_config):
    """Gives a bank with its ledger, the configuration, and a right order for it."""

    def make(**values):
        config = tiny_config(**{"privacy.noise": "secure", **values})
        federation = records.load(config)
        work = trainable.load(config, federation.labels)
        who = Institution.locate(config, 0)
        if config.privacy.enabled:
            who.open_ledger(create=True).close()
        traits = config.federation.traits
        order = train_order(work, parts=traits.parts_sent(1), kept=traits.local_parts)
        return who, config, order

    return make


def _refused(who, order):
    """The code of the refusal, once it is sure that nothing was charged."""
    with pytest.raises((Refusal, InputError)) as caught:
        who.answer(order)
    with Ledger.open(who.ledger_path) as ledger:
        assert not ledger.show()["entries"]
    return getattr(caught.value, "code", "bad-configuration")


def test_a_round_that_ran_out_of_memory_is_tried_with_a_smaller_batch_and_charged_once(
    bank, monkeypatch
):
    who, config, order = bank()

    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("client.cohort.train_rounds", fails)
        with pytest.raises(MemoryError):
            who.answer(order)
    smaller = {"training.physical-batch": 2, "engine.threads": 2, "home.method": "none"}
    again = dataclasses.replace(who, config=config.replace(smaller))
    assert again.answer(order).privacy.steps == config.training.local_steps
    with Ledger.open(who.ledger_path) as ledger:
        assert len(ledger.show()["entries"]) == 1
    changed = config.replace({"training.learning-rate": 0.125})
    for other in (
        dataclasses.replace(who, config=changed),
        dataclasses.replace(who, name="another name on the same ledger"),
    ):
        with pytest.raises(Refusal, match="round-already-answered"):
            other.answer(order)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        *(
            ({"parts": parts}, "strategy-mismatch")
            for parts in (
                (),
                ("Z",),
                ("residual",),
                ("magnitude",),
                ("B",),
                ("A", "B"),
                (*ALL, "Z"),
                (*ALL, "residual"),
                (*ALL, "A"),
                ("A", "A", "B", "magnitude", "head"),
                ALL[::-1],
            )
        ),
        ({"kept": ("B",)}, "strategy-mismatch"),
        ({"parts": ("A", "head"), "kept": ("B", "magnitude")}, "strategy-mismatch"),
        *(({"participations": n}, "malformed-message") for n in (-5, 0, 4, 10**9, 2**63 - 1)),
        *(({"round": n}, "malformed-message") for n in (-1, 0, 4, 10**9)),
        ({"report": ("loss",)}, "metrics-not-allowed"),
        ({"report": ("loss", "loss")}, "metrics-not-allowed"),
        ({"base": ""}, "base-mismatch"),
    ],
)
def test_an_order_that_the_run_does_not_have_is_refused_before_the_charge(bank, changes, code):
    who, _, order = bank()
    assert _refused(who, dataclasses.replace(order, **changes)) == code
    assert who.answer(order).privacy.steps == 1  # the right one is followed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: AdapterState({}),
        lambda state: state.only(("A",)),
        lambda state: AdapterState({name: t.double() for name, t in state.items()}),
        lambda state: AdapterState({name: t * math.nan for name, t in state.items()}),
        lambda state: AdapterState({name: t + math.inf for name, t in state.items()}),
        lambda state: AdapterState({name: t[:1] for name, t in state.items()}),
        lambda state: state.updated({"another": torch.zeros(1)}),
    ],
    ids=["empty", "A", "double", "nan", "inf", "shape", "more"],
)
def test_an_adapter_that_does_not_fit_is_refused_before_the_charge(bank, spoil):
    who, _, order = bank()
    spoiled = dataclasses.replace(order, adapter=spoil(order.adapter))
    assert _refused(who, spoiled) == "adapter-mismatch"


@pytest.mark.parametrize(
    ("value", "values"),
    [
        (1e30, {}),
        (100.0, {"training.learning-rate": 1e-7}),
        (100.0, {"training.learning-rate": 1e-7, "training.optimizer": "adam"}),
        (1.0, {"privacy.max-grad-norm": 1e-6, "training.learning-rate": 1e-4}),
    ],
    ids=["large", "slow", "slow adam", "clipped"],
)
def test_an_adapter_that_no_step_changes_is_refused_before_the_charge(bank, value, values):
    who, _, order = bank(**values)
    state = {name: torch.full_like(tensor, value) for name, tensor in order.adapter.items()}
    stuck = dataclasses.replace(order, adapter=AdapterState(state))
    assert _refused(who, stuck) == "step-too-small"


PARTS = st.lists(st.sampled_from([*ALL, "residual", "Z", ""]), max_size=6).map(tuple)


@given(
    st.sampled_from(sorted(STRATEGY_TABLE)), PARTS, PARTS, st.integers(-3, 6), st.integers(-3, 6)
)
def test_only_the_very_parts_of_strategy_and_round_are_accepted(
    strategy, parts, kept, round, participations
):
    """Every strategy's own parts are accepted in every round, and no others."""
    config = from_flat({"federation.strategy": strategy, "federation.rounds": 4})
    order = train_order(round=round, participations=participations, parts=parts, kept=kept)

    def accepted(order):
        try:
            checks.check_order(order, config)
        except Refusal:
            return False
        return True

    numbers = 1 <= round <= 4 and 1 <= participations <= 4
    own = STRATEGY_TABLE[strategy]
    right = (parts, kept) == (own.parts_sent(round), own.local_parts)
    assert accepted(order) == (numbers and right)
    proper = dataclasses.replace(order, parts=own.parts_sent(round), kept=own.local_parts)
    assert accepted(proper) == numbers


# What a server chooses, and what it means at the ledger's delta.


def test_epsilon_at_a_large_delta_is_refused_for_what_it_is_at_the_ledgers(bank, tmp_path):
    who, config, order = bank(**{"privacy.delta": 0.0039})
    who.ledger_path.unlink()
    Ledger.create(who.ledger_path, max_epsilon=50.0, delta=1e-5, accountant="rdp")
    with Ledger.open(who.ledger_path) as ledger:
        ledger.bind(records.load(config).train(0).fingerprint, "record")
    limited = dataclasses.replace(who, max_delta=0.5, max_run_epsilon=8.0)
    with pytest.raises(Refusal, match=r"spends epsilon 8 at its delta 0\.0039, which is 1\d\.\d"):
        limited.answer(order)
    assert _refused(limited, order) == "epsilon-too-large"
    strict = dataclasses.replace(who, max_delta=0.0038, max_run_epsilon=50.0)
    assert _refused(strict, order) == "delta-too-large"
    exact = dataclasses.replace(who, max_delta=0.0039, max_run_epsilon=20.0)
    assert exact.answer(order).privacy.epsilon <= 8.0


@pytest.mark.parametrize(
    ("own", "delta", "rate"),
    [("rdp", 0.0039, 0.05), ("rdp", 1e-5, 1.0), ("prv", 1e-7, 1.0), ("prv", 1e-3, 0.05)],
)
def test_no_choice_of_a_server_spends_more_than_the_limit_at_the_ledgers_delta(own, delta, rate):
    values = {
        "privacy.delta": delta,
        "training.batch-size": rate,
        "federation.rounds": 4,
    }
    plan = plan_run(from_flat(values), 64, 4)
    ledger = SimpleNamespace(delta=1e-5, accountant=own)
    spent = composition.epsilon(plan.events, 1e-5, own)
    try:
        checks.check_limits(
            plan, ledger, max_delta=1.0, max_run_epsilon=8.0, max_alone_epsilon=math.inf
        )
    except Refusal as refusal:
        assert refusal.code == "epsilon-too-large" and spent > 8.0
    else:
        assert spent <= 8.0


SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 3,
    "privacy.colluding": 1,
    "federation.weighting": "public-size",
}


def test_the_epsilon_if_all_others_collude_has_a_limit_of_its_own(bank):
    who, _, order = bank(**SECURE)
    with Ledger.open(who.ledger_path) as ledger:
        plan = plan_run(who.config, 64, order.participations)
        alone = accounting.epsilon_alone(plan.events, ledger.delta, ledger.accountant)
    assert alone > 8.0
    strict = dataclasses.replace(who, max_alone_epsilon=0.99 * alone)
    assert _refused(strict, order) == "alone-epsilon-too-large"
    loose = dataclasses.replace(who, max_alone_epsilon=1.01 * alone)
    assert _refused(loose, order) == "secure-order-missing"  # what is checked next


def test_an_answer_that_the_ledger_cannot_store_is_refused_before_a_charge(bank, monkeypatch):
    """SQLite takes no value of over 10^9 bytes; it would be found after the charge."""
    assert checks.MAX_ANSWER / 8 < noise_shares.MAX_PARAMETERS  # that the plan counts
    who, _, order = bank()
    monkeypatch.setattr(checks, "MAX_ANSWER", 1000)
    assert _refused(who, order) == "adapter-too-large"


def test_the_settings_decide_about_secure_aggregation(tmp_path):
    own = Settings(
        name="a", source="r.csv", ledger="l.db", state=str(tmp_path), models=("m",), labels=("x",)
    )
    asked = SECURE | {
        "data.source": "institutions",
        "data.institutions": 5,
        "data.labels": '["x"]',
        "model.name": "m",
        "privacy.delta": 1e-5,
        "training.batch-size": 0.2,
    }

    def code(asked=asked, **changes):
        try:
            return config_policy.apply(dataclasses.replace(own, **changes), asked).privacy.trust
        except Refusal as refusal:
            return refusal.code

    assert code() == "trust-not-allowed"
    assert code(secure_aggregation=True) == "secure-aggregation"
    assert code(secure_aggregation=True, min_honest=4) == "too-few-honest"
    assert code(secure_aggregation=True, min_colluding=2) == "too-few-colluding"
    run = config_policy.apply(dataclasses.replace(own, secure_aggregation=True), asked)
    with_limit = dataclasses.replace(own, max_alone_epsilon=3.0)
    assert Institution.deployed(with_limit, run).max_alone_epsilon == 3.0

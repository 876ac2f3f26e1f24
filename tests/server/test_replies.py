"""Every field of every reply, when it arrives: what no honest institution sends is refused."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord
from flwr.clientapp import ClientApp
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.config import config
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting, composition
from fedlora.privacy.budget import plan_run
from fedlora.runs.run_files import read_records
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate, Query
from server.exchange import exchange, send
from server.replies import Replies
from server.spending import Spending
from simulation.engines.inline import InlineGrid
from strategies.base import Round
from tests.samples import privacy_spent

STATE = AdapterState({"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(4, 2)})
ROUND = Round(number=2, asked=1, before=STATE, parts=("A", "B"), run="a1")
RUN = {
    "training.batch-size": 0.25,
    "training.local-steps": 2,
    "federation.weighting": "uniform",
    "federation.rounds": 3,
    "privacy.noise": "seeded",
    "privacy.delta": 1e-4,
}
SPENDING = Spending(config=config.from_flat(RUN), participations=3)
PLAN = plan_run(SPENDING.config, 100, 3)
HONEST = privacy_spent(
    epsilon=7.0,
    noise_multiplier=PLAN.noise_multiplier,
    steps=4,
    ledger_epsilon=7.0,
    ledger_epsilon_alone=7.0,
    ledger_delta=1e-4,
    ledger_limit=8.0,
)
UPDATE = ClientUpdate(institution="bank", round=2, run="a1", adapter=STATE, privacy=HONEST)
NOT_FINITE = (math.nan, math.inf, -math.inf)
BAD = [
    *(("epsilon", value) for value in (*NOT_FINITE, -1.0, 8.1, 1e9)),
    *(("delta", value) for value in (*NOT_FINITE, -1.0, 0.0, 1e-5, 0.999, 1.0)),
    *(("noise_multiplier", value) for value in (*NOT_FINITE, -1.0, 0.0, 1e-200, 0.1, 1e300)),
    *(("sample_rate", value) for value in (*NOT_FINITE, -0.25, 0.0, 0.26, 1.0, 2.0)),
    *(("steps", value) for value in (-1, 0, 1, 5, 7, 8, 10**12)),
    *(("max_grad_norm", value) for value in (*NOT_FINITE, -1.0, 0.0, 2.0)),
    *(("ledger_epsilon", value) for value in (*NOT_FINITE, -1.0)),
    *(("ledger_epsilon_alone", value) for value in (math.nan, -math.inf, -1.0, 6.9)),
    *(("ledger_delta", value) for value in (*NOT_FINITE, -1.0, 0.0, 5e-324, 1.0)),
    *(("ledger_limit", value) for value in (*NOT_FINITE, -1.0, 0.0)),
    *(("noise", value) for value in ("secure", "")),
    *(("unit", value) for value in ("customer", "")),
]


def _answered(*contents, report=(), spending=SPENDING, round=ROUND):
    """What becomes of these answers of one institution each to a round's orders."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(contents[context.node_id - 1], reply_to=message)

    grid = InlineGrid(app, len(contents), {})
    orders = [
        Message(wire.pack_query(Query(run="a1", first=True, participations=3)), node, "train")
        for node in range(1, len(contents) + 1)
    ]
    names = {1: "bank"} | {node: f"bank-{node}" for node in range(2, len(contents) + 1)}
    replies = Replies(
        grid, send(grid, orders), names, round, report=report, spending=spending, timeout=5.0
    )
    return replies, [update.institution for update, _ in replies]


def test_an_honest_reply_counts_and_its_record_is_kept():
    replies, valid = _answered(wire.pack_update(UPDATE))
    assert valid == ["bank"] and not replies.failed and not replies.invalid
    assert replies.privacy == {"bank": dataclasses.asdict(HONEST)}


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_figure_that_no_plan_has_is_a_refused_reply(field, value):
    privacy = dataclasses.replace(HONEST, **{field: value})
    replies, valid = _answered(wire.pack_update(dataclasses.replace(UPDATE, privacy=privacy)))
    assert replies.failed == {"bank": "invalid-privacy-record"}
    assert not valid and not replies.privacy and replies.valid == 0


def test_a_record_without_dp_and_dp_without_a_record_are_refused():
    replies, _ = _answered(wire.pack_update(UPDATE), spending=None)
    assert replies.failed == {"bank": "invalid-privacy-record"}
    replies, _ = _answered(wire.pack_update(dataclasses.replace(UPDATE, privacy=None)))
    assert replies.failed == {"bank": "no-privacy-record"}


@pytest.mark.parametrize(
    ("figures", "code"),
    [
        ({f"figure-{i}": 0.5 for i in range(100_000)}, "invalid-metrics"),
        ({"loss": 0.5, "records": 3.0}, "invalid-metrics"),
        ({"loss": math.nan}, "invalid-metrics"),
        ({"loss": math.inf}, "invalid-metrics"),
        ({"loss": [0.5] * 1000}, "malformed-message"),
        ({"x" * 5000: 0.5}, "malformed-message"),
    ],
    ids=["many", "another", "nan", "inf", "list", "long"],
)
def test_figures_that_no_order_asked_for_or_that_are_no_numbers_are_refused(figures, code, caplog):
    content = wire.pack_update(dataclasses.replace(UPDATE, metrics={}))
    content["metrics"] = MetricRecord(figures)
    replies, valid = _answered(content, report=("loss",))
    assert replies.failed == {"bank": code} and not valid and not replies.reported
    assert len(caplog.text) < 1000


ANY = st.one_of(
    st.floats(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5), st.booleans(), st.binary()
)


@given(st.sampled_from([f.name for f in dataclasses.fields(HONEST)]), ANY)
@example("ledger_epsilon_alone", math.inf)
def test_whatever_is_in_a_field_the_reply_is_refused_or_the_statement_holds(field, value):
    content = wire.pack_update(UPDATE)
    content["privacy"] = ConfigRecord({**content["privacy"], field: value})
    replies, _ = _answered(content)
    if replies.failed:
        assert set(replies.failed.values()) <= {"invalid-privacy-record", "malformed-message"}
        assert not replies.privacy
    else:
        stated = SPENDING.stated(replies.privacy["bank"], 3)
        less = dataclasses.replace(PLAN, noise_multiplier=stated["noise_multiplier"])
        assert stated["epsilon"] == composition.epsilon(less.events, 1e-4, "prv")
        assert stated["noise_multiplier"] <= PLAN.noise_multiplier
        for record in (stated, stated.pop("institution_says")):
            assert record.pop("ledger_epsilon_alone") >= 7.0  # also inf: its own share is nothing
            json.dumps(record, allow_nan=False)


def test_less_noise_than_the_budget_allows_is_refused_in_the_first_round_and_not_at_the_end():
    said = dataclasses.replace(HONEST, noise_multiplier=0.995 * PLAN.noise_multiplier)
    with pytest.raises(Refusal, match=r"noise_multiplier is .*with it the run spends 8\.0\d+ of 8"):
        SPENDING.checked(said)


@given(st.sampled_from(["institution", "round", "run", "size"]), ANY)
def test_whatever_is_in_a_header_one_institution_is_concerned(field, value):
    content = wire.pack_update(UPDATE)
    content["update"] = ConfigRecord({**content["update"], field: value})
    other = dataclasses.replace(UPDATE, institution="bank-2")
    replies, valid = _answered(content, wire.pack_update(other))
    assert "bank-2" in valid and set(replies.failed) <= {"bank"}
    honest = getattr(UPDATE, field)
    same = value == honest and (field == "size" or type(value) is type(honest))
    same = same and not isinstance(value, bool)
    assert ("bank" in valid) == same


def test_a_second_reply_to_one_message_is_nobodys():
    class Twice(InlineGrid):
        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    app = ClientApp()

    @app.query()
    def hello(message, context):
        return Message(message.content, reply_to=message)

    grid = Twice(app, 3, {})
    query = wire.pack_query(Query(run="a1", first=True, participations=1))
    orders = [Message(query, node, MessageType.QUERY) for node in (1, 2, 3)]
    came = [node for node, reply in exchange(grid, orders, 5.0) if reply is not None]
    assert sorted(came) == [1, 2, 3]


# Whole runs.


def _stated(directory):
    said = json.loads((Path(directory) / "privacy.json").read_text())
    return {key: value for key, value in said.items() if key not in ("run", "seal")}


def test_a_run_with_another_bad_record_each_round_ends_and_so_does_its_resume(
    tiny_config, simulate_run, monkeypatch
):
    bad = [(field, value) for field, value in BAD if (field, value) != ("noise", "secure")]
    bad = [one for one in bad if one[0] != "steps" or one[1] < 1 or one[1] > 100]
    bad = [*bad[::7], ("steps", 0), ("noise_multiplier", -1.0), ("delta", 0.0)]
    honest = wire.pack_update

    def pack_update(update):
        if update.institution != "Beta":
            return honest(update)
        field, value = bad[update.round - 1]
        privacy = dataclasses.replace(update.privacy, **{field: value})
        return honest(dataclasses.replace(update, privacy=privacy))

    monkeypatch.setattr(wire, "pack_update", pack_update)
    made = tiny_config(**{"federation.rounds": len(bad)})
    result = simulate_run(made)
    run = Path(made.run_dir)
    rejected = [record["aggregation"]["rejected"] for record in read_records(run)]
    assert rejected == [{"Beta": "invalid-privacy-record"}] * len(bad)
    stated = _stated(run)
    assert set(stated["institutions"]) == {"Alpha", "Delta", "Gamma"}
    bound = {"rounds_asked": len(bad), "epsilon_at_most": 8.0, "delta": 1e-4}
    assert stated["without_report"] == {"Beta": bound}
    assert result["epsilon_max"] == 8.0 and result["delta"] == 1e-4
    for name in ("result.json", "privacy.json"):
        (run / name).unlink()
    sorted((run / "checkpoints").iterdir())[-1].unlink()  # the last round is run once more
    assert simulate_run(made)["epsilon_max"] == 8.0
    assert _stated(run) == stated


SECURE = RUN | {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "training.local-steps": 1,
    "federation.weighting": "public-size",
}
SUMMED = Spending(config=config.from_flat(SECURE), participations=3)
SUM_ROUND = dataclasses.replace(
    ROUND, weighting="public-size", words=5, sizes={"bank": 64.0, "bank-2": 32.0}
)
SUM_UPDATE = dataclasses.replace(
    UPDATE,
    adapter=AdapterState({}),
    words=np.arange(5),
    privacy=dataclasses.replace(
        HONEST, noise_multiplier=plan_run(SUMMED.config, 64, 3).noise_multiplier, steps=2
    ),
)


def _summed(**changes):
    content = wire.pack_update(dataclasses.replace(SUM_UPDATE, **changes))
    return _answered(content, spending=SUMMED, round=SUM_ROUND)


def test_a_vector_counts_with_the_size_class_of_the_roster():
    replies, valid = _summed()
    assert valid == ["bank"] and not replies.failed
    assert SUM_ROUND.weight(SUM_UPDATE) == 64.0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"words": np.arange(4)}, "invalid-update"),
        ({"words": np.arange(0)}, "invalid-update"),
        ({"words": None, "adapter": STATE}, "invalid-update"),
        ({"size": 64.0}, "invalid-size"),
        ({"privacy": HONEST}, "invalid-privacy-record"),
        ({"privacy": None}, "no-privacy-record"),
        ({"round": 1}, "stale-update"),
        ({"run": "b2"}, "other-run"),
    ],
)
def test_an_answer_that_is_no_vector_of_this_round_is_refused(changes, code):
    replies, valid = _summed(**changes)
    assert not valid and replies.failed == {"bank": code}


def test_the_plan_of_a_run_with_shares_states_the_promised_and_the_lonely_epsilon():
    said = SUMMED.stated(dataclasses.asdict(SUM_UPDATE.privacy), rounds_asked=3)
    plan = plan_run(SUMMED.config, 64, 3)
    assert said["steps"] == 3 and said["epsilon"] <= 8.0 < said["epsilon_alone"]
    assert said["epsilon"] == composition.epsilon(plan.events, plan.delta, "prv")
    assert said["epsilon_alone"] == accounting.epsilon_alone(plan.events, plan.delta, "prv")


def test_a_record_of_another_round_or_run_is_not_kept():
    for changes in ({"round": 1}, {"run": "b2"}, {"institution": "another"}, {"size": 4.0}):
        replies, _ = _answered(wire.pack_update(dataclasses.replace(UPDATE, **changes)))
        assert replies.failed and not replies.privacy

"""What leaves an institution when it says no: a code, and nothing else."""

import dataclasses

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client import app as client_app
from client import institution
from experiments.engines.grid import identify
from fedlora import adapters, wire
from fedlora.errors import InputError, Refusal


def _ask(config, **node_config):
    identify()
    query = wire.Query(run="r", first=True, participations=1)
    message = Message(wire.pack_query(query), 1, MessageType.QUERY)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": 4, **node_config},
        state=RecordDict(),
        run_config=config.flat(),
    )
    return client_app.app(message, context)


def _code(reply) -> str:
    with pytest.raises(Refusal) as caught:
        wire.unpack_hello(reply.content)
    return caught.value.code


def _order(work, **changes):
    order = wire.TrainOrder(
        run="r",
        round=1,
        participations=3,
        base=work.base.digest,
        report=(),
        parts=adapters.PARTS,
        adapter=work.start,
    )
    return dataclasses.replace(order, **changes)


def test_outside_a_simulation_every_order_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert _code(_ask(tiny_config())) == "not-a-simulation"
    assert _code(_ask(tiny_config(), simulation="yes")) == "not-a-simulation"
    assert wire.unpack_hello(_ask(tiny_config(), simulation=True).content).institution == "Alpha"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refusal("budget-exhausted", "secret detail"), "budget-exhausted"),
        (Refusal("guard-not-clipped", "secret detail"), "guard"),
        (Refusal("guard-noise", "secret detail"), "guard"),
        (InputError("secret detail"), "bad-configuration"),
        (RuntimeError("secret detail"), "failed"),
        (MemoryError("secret detail"), "failed"),
    ],
)
def test_errors_leave_as_codes_and_their_text_stays(tiny_config, monkeypatch, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(institution, "locate", fail)
    reply = _ask(tiny_config(), simulation=True)
    assert "secret" not in str(reply.content)
    assert _code(reply) == code


def test_under_dp_an_order_that_asks_for_figures_is_refused(tiny_config):
    from fedlora import trainable

    config = tiny_config()
    work = trainable.load(config, trainable.records(config).labels)
    order = _order(work, report=("loss",))
    who = institution.locate(config, 0)
    with pytest.raises(Refusal, match="metrics-not-allowed"):
        institution.answer(who, order, config)
    assert not who.ledger.exists()


def test_an_order_for_another_base_is_refused(tiny_config):
    from fedlora import trainable

    config = tiny_config()
    work = trainable.load(config, trainable.records(config).labels)
    order = _order(work, base="0" * 64)
    with pytest.raises(Refusal, match="base-mismatch"):
        institution.answer(institution.locate(config, 0), order, config)


def test_delta_is_checked_against_the_size_class_never_the_count(tiny_config):
    config = tiny_config(**{"privacy.delta": 1 / 100})
    for units in (64, 99, 100, 127):  # one class: one answer
        with pytest.raises(InputError, match="127 records"):
            institution.budget(config, units, 3)
    fine = tiny_config(**{"privacy.delta": 1 / 128})
    plans = {institution.budget(fine, units, 3) for units in (64, 99, 127)}
    assert len(plans) == 1


def test_a_ledger_whose_delta_means_nothing_for_its_records_is_refused(tiny_config):
    from client.ledger import Ledger
    from fedlora import trainable

    config = tiny_config()
    who = institution.locate(config, 0)
    who.ledger.parent.mkdir(parents=True)
    Ledger.create(who.ledger, max_epsilon=8.0, delta=0.02)
    shard = trainable.records(config).train(0)
    with pytest.raises(Refusal, match="ledger-delta"):
        institution.open_ledger(who, config, shard, create=False)

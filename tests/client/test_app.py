"""What leaves an institution when it says no: a code, and nothing else."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

import fedlora
from client import app
from client.institution import Institution
from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.errors import InputError, Refusal
from fedlora.privacy.budget import plan_run
from fedlora.wire import wire
from fedlora.wire.messages import Query
from simulation.engines.grid import identify
from tests.samples import train_order


def _ask(config, content=None, kind=MessageType.QUERY, **node_config):
    identify()
    if content is None:
        content = wire.pack_query(Query(run="a1", first=True, participations=1))
    message = Message(content, 1, kind)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "simulation": True, **node_config},
        state=RecordDict(),
        run_config=config.flat(),
    )
    return app.app(message, context)


def _code(reply) -> str:
    with pytest.raises(Refusal) as caught:
        wire.unpack_hello(reply.content)
    return caught.value.code


def test_outside_a_simulation_an_institution_without_settings_refuses(tiny_config):
    assert _code(_ask(tiny_config(), simulation=None)) == "no-settings"
    assert _code(_ask(tiny_config(), simulation="yes")) == "no-settings"
    assert wire.unpack_hello(_ask(tiny_config()).content).institution == "Alpha"
    assert _code(_ask(tiny_config(), settings="/nowhere.toml")) == "bad-configuration"


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (MessageType.QUERY, "query"),
        (MessageType.TRAIN, "order"),
        (MessageType.EVALUATE, "order"),
        (wire.HOME, "order"),
        (wire.RELEASED, "order"),
        *((kind, "secure") for kind in (wire.KEYS, wire.SHARES, wire.LIST, wire.UNMASK)),
    ],
)
def test_a_server_of_another_version_is_refused_whatever_else_it_sends(
    tiny_config, monkeypatch, caplog, kind, record
):
    def read(*_):
        raise AssertionError("the configuration was read first")

    monkeypatch.setattr(app, "_institution", read)
    about = {"version": "0.0.9", "a-new-field": 1}
    content = RecordDict({record: ConfigRecord(about), "a-new-record": ArrayRecord()})
    reply = _ask(tiny_config(), content, kind, simulation=True)
    assert _code(reply) == "version-mismatch"
    assert "0.0.9" in caplog.text and fedlora.__version__ in caplog.text
    del content[record]["version"]  # as of a server before versions were stated
    assert _code(_ask(tiny_config(), content, kind, simulation=True)) == "version-mismatch"


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

    monkeypatch.setattr(Institution, "locate", fail)
    reply = _ask(tiny_config(), simulation=True)
    assert "secret" not in str(reply.content)
    assert _code(reply) == code


def test_under_dp_an_order_that_asks_for_figures_is_refused(tiny_config):
    from fedlora.data import records
    from fedlora.models import trainable

    config = tiny_config()
    work = trainable.load(config, records.load(config).labels)
    order = train_order(work, report=("loss",))
    who = Institution.locate(config, 0)
    with pytest.raises(Refusal, match="metrics-not-allowed"):
        who.answer(order)
    assert not who.ledger_path.exists()


def test_an_order_for_another_base_is_refused(tiny_config):
    from fedlora.data import records
    from fedlora.models import trainable

    config = tiny_config()
    work = trainable.load(config, records.load(config).labels)
    order = train_order(work, base="0" * 64)
    with pytest.raises(Refusal, match="base-mismatch"):
        Institution.locate(config, 0).answer(order)


def test_delta_is_checked_against_the_size_class_never_the_count(tiny_config):
    config = tiny_config(**{"privacy.delta": 1 / 100})
    for units in (64, 99, 100, 127):  # one class: one answer
        with pytest.raises(InputError, match="127 records"):
            plan_run(config, units, 3)
    fine = tiny_config(**{"privacy.delta": 1 / 128})
    plans = {plan_run(fine, units, 3) for units in (64, 99, 127)}
    assert len(plans) == 1


def test_a_ledger_whose_delta_means_nothing_for_its_records_is_refused(tiny_config):
    from client.ledger import Ledger

    config = tiny_config()
    who = Institution.locate(config, 0)
    who.ledger_path.parent.mkdir(parents=True)
    Ledger.create(who.ledger_path, max_epsilon=8.0, delta=0.02)
    with pytest.raises(Refusal, match="ledger-delta"):
        who.open_ledger()


@pytest.fixture
def ask_banks(tiny_config, tmp_path):
    """Gives a function that sends train orders to banks and returns what each one answers."""
    from fedlora.data import records
    from fedlora.models import trainable

    identify()

    def ask(name, orders, *, together, **values):
        config = tiny_config(**{"run-dir": str(tmp_path / name), **values})
        federation = records.load(config)
        work = trainable.load(config, federation.labels)
        for index in range(len(federation.names) if config.privacy.enabled else 0):
            Institution.locate(config, index).open_ledger(create=True).close()
        calls = []
        adapter = wire.pack_adapter(train_order(work).adapter)
        packed = {}  # the server packs an order once a round
        for bank, changes in orders:
            order = train_order(work, **changes)
            content = packed.setdefault(repr(changes), wire.pack_order(order, adapter))
            context = Context(
                run_id=1,
                node_id=bank + 1,
                node_config={"partition-id": bank, "num-partitions": 4, "simulation": True},
                state=RecordDict(),
                run_config=config.flat(),
            )
            calls.append((Message(content, bank + 1, MessageType.TRAIN), context))
        replies = app.app.together(calls) if together else [app.app(*call) for call in calls]
        return [reply.content for reply in replies]

    return ask


def _same(one, other):
    one, other = wire.unpack_update(one), wire.unpack_update(other)
    return one.institution == other.institution and all(
        torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter
    )


EVERYBODY = [(bank, {}) for bank in range(4)]


def test_answers_given_together_are_those_given_one_by_one(ask_banks):
    alone = ask_banks("alone", EVERYBODY, together=False)
    for one, other in zip(alone, ask_banks("both", EVERYBODY, together=True), strict=True):
        assert _same(one, other)
        assert wire.unpack_update(other).privacy == wire.unpack_update(one).privacy
    for plan in ({"training.local-steps": 2}, {"privacy.epsilon": "inf"}):
        alone = ask_banks(f"alone-{len(plan)}{plan}", EVERYBODY, together=False, **plan)
        both = ask_banks(f"both-{plan}", EVERYBODY, together=True, **plan)
        assert all(_same(one, other) for one, other in zip(alone, both, strict=True))


def test_different_orders_in_one_call_are_each_followed(ask_banks):
    rolora = {"federation.strategy": "rolora"}
    first, second = (
        {"round": number, "parts": STRATEGY_TABLE["rolora"].parts_sent(number)} for number in (1, 2)
    )
    orders = [(0, first), (1, second), (2, first)]
    alone = ask_banks("alone", orders, together=False, **rolora)
    both = ask_banks("both", orders, together=True, **rolora)
    assert all(_same(one, other) for one, other in zip(alone, both, strict=True))


def test_when_training_together_fails_each_trains_alone_and_is_charged_once(
    ask_banks, monkeypatch, tmp_path
):
    from client import private_training
    from client.ledger import Ledger

    alone = ask_banks("alone", EVERYBODY, together=False)
    whole = private_training.train_privately

    def fail(work, participants, plan):
        if len(participants) > 1:
            raise Refusal("guard-noise", "as asked")
        return whole(work, participants, plan)

    monkeypatch.setattr(private_training, "train_privately", fail)
    replies = ask_banks("both", EVERYBODY, together=True)
    assert all(_same(one, other) for one, other in zip(alone, replies, strict=True))
    with Ledger.open(tmp_path / "both" / "ledgers" / "Alpha.db") as ledger:
        assert [entry["steps"] for entry in ledger.show()["entries"]] == [1]


def _code_of(content) -> str:
    with pytest.raises(Refusal) as caught:
        wire.unpack_update(content)
    return caught.value.code

"""An institution against a server that orders whatever it likes.

The institution is deployed: records, ledger and limits are its own, messages reach its ClientApp as
Flower hands them over. Only training is a draw from the round's key, which may also break down.
The model is the list of charges that its ledger must hold and the answers that it has given.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import tomli_w
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from client.app import app
from client.ledger import Ledger
from fedlora.config.config import from_flat
from fedlora.config.sections import INSTITUTIONS
from fedlora.errors import Refusal
from fedlora.models import adapters
from fedlora.models.adapters import AdapterState
from fedlora.privacy.composition import Event
from fedlora.wire import wire
from fedlora.wire.messages import Query, TrainOrder
from simulation.engines.grid import identify
from tests.machines.budgets import search, searched
from tests.machines.conftest import LABELS
from tests.samples import train_order

DELTA, LIMIT = 1e-5, 7.0
BREAKDOWNS = ("guard", "error", "killed")
REFUSED = re.compile("[a-z0-9-]{1,64}")

ALLOWED = [
    {},
    {"privacy.epsilon": 1.0},
    {"training.local-steps": 2},
    {"training.batch-size": 0.25, "privacy.max-grad-norm": 0.5},
]
"""What an honest server may choose for a run."""
FORBIDDEN = [
    {"privacy.noise": "seeded"},
    {"privacy.epsilon": 100.0},
    {"privacy.epsilon": float("inf")},
    {"training.local-steps": 50},
    {"training.batch-size": 7.0},
    {"training.max-length": 5000},
    {"privacy.unit": "customer"},
    {"privacy.delta": 0.5},
    {"federation.weighting": "records"},
    {"federation.strategy": "exact"},
    {"data.source": "/data/other.csv"},
    {"data.labels": '["loan"]'},
    {"model.name": "/models/other"},
]
"""What an institution with these settings never follows."""
FORGED = [
    {"base": "0" * 64},
    {"report": ("loss",)},
    {"kept": ("B",)},
    {"run": "../run"},
    {"run": ""},
    {"round": -1},
    {"participations": 0},
    {"participations": -5},
    {"parts": ()},
    {"parts": ("Z",)},
    {"parts": ("residual",)},
]
"""Parts of an order that void it."""


class Killed(BaseException):
    """The process ends here, as far as its ledger can tell."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """An order as it was sent, so that it can be sent again."""

    order: TrainOrder
    changes: tuple
    honest: bool

    @property
    def digest(self):
        """Everything that decides the release."""
        values = dataclasses.replace(self.order, adapter=None)
        adapter = safetensors.torch.save(dict(self.order.adapter))
        return dataclasses.astuple(values), adapter, self.changes


def _bent(adapter, how):
    """The global adapter as a server may send it, and whether an institution may follow it."""
    tensors = dict(adapter)
    first = next(name for name in tensors if adapters.kind(name) == "A")
    if how == "nan":
        tensors[first] = torch.full_like(tensors[first], float("nan"))
    elif how == "narrow":
        tensors[first] = tensors[first][:-1]
    elif how == "missing":
        del tensors[first]
    elif how == "residual":
        for name in adapters.residual_names(first.removesuffix(".lora_A.weight")):
            tensors[name] = tensors[first].clone()
    elif how == "moved":
        tensors = {name: tensor + 0.25 for name, tensor in tensors.items()}
    return AdapterState(tensors)


class InstitutionMachine(RuleBasedStateMachine):
    """One institution, many runs, and a server that is not to be trusted."""

    values = None  # of a configuration
    source = None  # the institution's records
    base = start = None  # digest of the base model, and the adapter that a run starts from
    drawn_training = None

    orders = Bundle("orders")

    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.charged = []  # (run, round, digest, event) in order
        self.answers = {}  # (run, round) -> digest, reply
        self.taken = {}  # digest -> event of the steps that were taken
        self.breakdown = None
        self.now = None
        self.last = {}  # run -> last round answered

    def teardown(self):
        shutil.rmtree(self.directory)

    @initialize()
    def begin(self):
        identify()
        type(self).drawn_training(self._training)
        file = self.directory / "institution.toml"
        own = {
            "name": "Alpha",
            "source": str(type(self).source),
            "labels": LABELS,
            "ledger": "ledger.db",
            "state": "state",
            "models": [type(self).values["model.name"]],
            "max-run-epsilon": 3.0,
            "max-steps": 4,
        }
        file.write_text(tomli_w.dumps(own))
        file.chmod(0o600)
        self.ledger = self.directory / "ledger.db"
        Ledger.create(self.ledger, max_epsilon=LIMIT, delta=DELTA, accountant="prv")
        self.node_config = {"settings": str(file)}

    # What the institution sees.

    def _config(self, changes):
        values = type(self).values | {
            "data.source": INSTITUTIONS,
            "data.labels": json.dumps(LABELS),
            "privacy.noise": "secure",
            "federation.rounds": 5,  # as many as a hello or an order may name
        }
        return values | dict(changes)

    def _context(self, changes):
        flat = from_flat(self._config({})).flat()
        return Context(
            run_id=1,
            node_id=1,
            node_config=self.node_config,
            state=RecordDict(),
            run_config=flat | dict(changes),
        )

    def _training(self, participants, plan):
        """Called in the place of training: steps are taken now."""
        with Ledger.open(self.ledger) as ledger:  # on the disk, as another process sees it
            entries = ledger.show()["entries"]
        (one,) = participants
        event = Event(
            noise_multiplier=one.mechanism.noise_multiplier,
            sample_rate=one.mechanism.sample_rate,
            steps=plan.steps,
        )
        mine = [e for e in entries if (e["run"], e["round"]) == self.now[:2] and not e["answered"]]
        assert mine, "steps are taken that nobody paid for"
        assert event in [_event(entry) for entry in mine], "the steps are not those that were paid"
        self.taken[self.now[2]] = event
        if self.breakdown == "guard":
            raise Refusal("guard-noise", "a guard that depends on a record")
        if self.breakdown == "error":
            raise RuntimeError("the record of Mrs Example")
        if self.breakdown == "killed":
            raise Killed

    def _entries(self):
        with Ledger.open(self.ledger) as ledger:
            shown = ledger.show()
        assert shown["epsilon"] <= LIMIT
        return [(e["run"], e["round"], _event(e)) for e in shown["entries"]]

    # What the server sends.

    @rule(
        target=orders,
        run=st.sampled_from(["a1", "b2", "c3"]),
        round=st.integers(1, 4),
        participations=st.sampled_from([1, 3, 3, 3]),
        allowed=st.sampled_from([0, 0, 0, *range(1, len(ALLOWED))]),
        adapter=st.sampled_from(["as it is", "as it is", "moved"]),
    )
    def order(self, run, round, participations, allowed, adapter):
        """An order that an institution may follow."""
        order = self._order(run, round, participations, adapter)
        sent = Sent(order, tuple(sorted(ALLOWED[allowed].items())), True)
        self._answered(sent)
        return sent

    @rule(
        target=orders,
        run=st.sampled_from(["a1", "b2"]),
        round=st.integers(1, 4),
        breakdown=st.sampled_from(BREAKDOWNS),
        adapter=st.sampled_from(["as it is", "moved"]),
    )
    def order_that_breaks_down(self, run, round, breakdown, adapter):
        """Training ends in a guard or an error, or the process dies."""
        sent = Sent(self._order(run, round, 3, adapter), (), True)
        self.breakdown = breakdown
        try:
            self._answered(sent)
        finally:
            self.breakdown = None
        return sent

    @rule(
        sent=orders,
        forged=st.one_of(
            st.sampled_from(FORGED).map(lambda c: ("order", c)),
            st.sampled_from(FORBIDDEN).map(lambda c: ("config", c)),
            st.sampled_from(["nan", "narrow", "missing", "residual"]).map(lambda c: ("adapter", c)),
        ),
    )
    def forged_order(self, sent, forged):
        """An order of before, changed so that no institution may follow it."""
        what, change = forged
        order, changes = sent.order, dict(sent.changes)
        if what == "order":
            order = dataclasses.replace(order, **change)
        elif what == "adapter":
            order = dataclasses.replace(order, adapter=_bent(order.adapter, change))
        else:
            changes |= change
        self._answered(Sent(order, tuple(sorted(changes.items())), False))

    @rule(sent=orders)
    def replay(self, sent):
        """The same order again."""
        self._answered(sent)

    @rule(
        sent=orders,
        participations=st.sampled_from([None, 1, 5]),
        allowed=st.sampled_from([None, *range(1, len(ALLOWED))]),
    )
    def changed_order(self, sent, participations, allowed):
        """The same round under another plan: followed only if nothing was before."""
        order = sent.order
        if participations is not None:
            order = dataclasses.replace(order, participations=participations)
        changes = sent.changes if allowed is None else tuple(sorted(ALLOWED[allowed].items()))
        self._answered(Sent(order, changes, True))

    @rule(sent=orders, other=orders)
    def together(self, sent, other):
        """Two orders in one call, as engines of simulations hand them over."""
        if (sent.order.run, sent.order.round) == (other.order.run, other.order.round):
            return  # which of the two is answered is another test's matter
        before = self._entries()
        self.now = None
        if {sent.digest, other.digest} - {digest for digest, _ in self.answers.values()}:
            return  # training is told apart by its round alone; here nobody trains
        replies = app.together(
            [(self._message(s), self._context(s.changes)) for s in (sent, other)]
        )
        assert self._entries() == before
        for each, reply in zip((sent, other), replies, strict=True):
            self._is_stored_or_dropped(each, reply.content)

    @rule(
        garbage=st.sampled_from(["nothing", "no adapter", "no order", "number as text", "more"]),
        sent=orders,
    )
    def garbage(self, garbage, sent):
        """A message that is no order."""
        content = self._message(sent).content
        order = dict(content.config_records["order"])
        content = {
            "nothing": lambda: RecordDict(),
            "no adapter": lambda: RecordDict({"order": ConfigRecord(order)}),
            "no order": lambda: RecordDict({"adapter": content["adapter"]}),
            "number as text": lambda: RecordDict(
                {"order": ConfigRecord(order | {"round": "1"}), "adapter": content["adapter"]}
            ),
            "more": lambda: RecordDict(
                {"order": ConfigRecord(order | {"more": 1}), "adapter": ArrayRecord({})}
            ),
        }[garbage]()
        before = self._entries()
        message = Message(content, 1, MessageType.TRAIN)
        assert self._code(app(message, self._context(sent.changes)).content) == "malformed-message"
        assert self._entries() == before

    @rule(
        run=st.sampled_from(["a1", "z9"]),
        first=st.booleans(),
        participations=st.sampled_from([1, 3, 5]),
    )
    def hello(self, run, first, participations):
        """The question before a run: it charges nothing, and knows a run that has begun."""
        before = self._entries()
        query = Query(run=run, first=first, participations=participations)
        message = Message(wire.pack_query(query), 1, MessageType.QUERY)
        said = wire.unpack_hello(app(message, self._context(())).content)
        assert said.institution == "Alpha"
        assert said.fits or run not in {charge[0] for charge in self.charged}
        assert self._entries() == before

    # What must come of it.

    def _order(self, run, round, participations, adapter):
        return train_order(
            run=run,
            round=round,
            participations=participations,
            base=self.base,
            adapter=_bent(self.start, adapter),
        )

    def _message(self, sent):
        content = wire.pack_order(sent.order, wire.pack_adapter(sent.order.adapter))
        return Message(content, 1, MessageType.TRAIN)

    def _answered(self, sent):
        """Send an order; check its reply and the ledger against what they may be."""
        order, place = sent.order, (sent.order.run, sent.order.round)
        before, digest = self._entries(), sent.digest
        assert [charge[:2] + charge[3:] for charge in self.charged] == before
        self.now = (*place, digest)
        taken = dict(self.taken)
        try:
            reply = app(self._message(sent), self._context(sent.changes)).content
        except Killed:
            reply = None
        entries = self._entries()
        new = entries[len(before) :]
        assert entries[: len(before)] == before and len(new) <= 1
        if new:  # charged: an order that may be followed, for the first time, and not answered yet
            assert sent.honest, "a forged order was charged"
            assert new[0][:2] == place
            assert place not in self.answers, "a round that was answered is charged again"
            assert digest not in {charge[2] for charge in self.charged}, "an order is charged twice"
            self.charged.append((*place, digest, new[0][2]))
        if self.taken != taken:
            assert digest in {charge[2] for charge in self.charged}
        if reply is None:
            return
        if set(reply.keys()) == {"refused"}:
            self._refused(sent, self._code(reply), charged=bool(new))
            return
        update = wire.unpack_update(reply)
        assert (update.institution, update.run, update.round) == ("Alpha", *place)
        assert sent.honest, "a forged order was answered"
        assert not update.metrics
        assert set(map(adapters.kind, update.adapter)) == set(order.parts) - {"magnitude"}
        if place in self.answers:
            self._is_stored_or_dropped(sent, reply)
            return
        (event,) = {charge[3] for charge in self.charged if charge[2] == digest}
        assert self.taken[digest] == event
        assert update.privacy.noise_multiplier == event.noise_multiplier
        assert update.privacy.sample_rate == event.sample_rate
        assert update.privacy.ledger_epsilon <= LIMIT
        assert update.privacy.epsilon <= from_flat(self._config(sent.changes)).privacy.epsilon * (
            1 + 1e-6
        )
        self.answers[place] = (digest, _bytes(reply))
        self.last[order.run] = max(order.round, self.last.get(order.run, 0))

    def _refused(self, sent, code, *, charged):
        place = (sent.order.run, sent.order.round)
        if code == "guard":
            assert self.breakdown == "guard" and self.taken.get(sent.digest)
        elif code == "failed":
            assert self.breakdown == "error", "an order ended in an error that nobody foresaw"
        else:
            assert not charged, f"charged, then refused: {code}"
            if sent.honest and place not in self.answers:  # only what was spent stands against it
                assert code in ("participation-cap", "run-changed", "budget-exhausted"), code

    def _is_stored_or_dropped(self, sent, reply):
        """An answered round gives its answer to its order, and none to another order."""
        digest, answer = self.answers[sent.order.run, sent.order.round]
        if set(reply.keys()) == {"refused"}:
            assert self._code(reply) == "round-already-answered"
            assert digest != sent.digest or sent.order.round < self.last[sent.order.run]
            return
        assert digest == sent.digest, "another order got the answer of the round"
        assert _bytes(reply) == answer, "the same order got another answer"

    def _code(self, reply):
        assert set(reply.keys()) == {"refused"} and set(reply["refused"]) == {"code", "nonce"}
        code = reply["refused"]["code"]
        assert REFUSED.fullmatch(code)
        return code


def _event(entry):
    return Event(**{field.name: entry[field.name] for field in dataclasses.fields(Event)})


def _bytes(reply):
    """What an answer says, to the last bit."""
    return wire.update_to_bytes(wire.unpack_update(reply))


@searched(fixed=(6, 20), long=(200, 50))
def test_an_institution_pays_once_for_what_it_answers_whatever_it_is_ordered(
    budget, institution_world
):
    search(InstitutionMachine, budget, **institution_world)

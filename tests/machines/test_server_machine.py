"""A server against institutions that answer whatever they like, in any order, late, twice or never.

The rounds, the replies' checks, the run's directory, the institutions and their ledgers are real;
what is between them is a Grid that follows a script. The model says for each round which
institutions' answers were valid, were not, or were both.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from client.app import app
from client.ledger import Ledger
from fedlora.models.adapters import AdapterState
from fedlora.wire import wire
from server.roster import RunFailed
from server.rounds import Federation
from server.run_directory import RunDirectory, read_records
from simulation.engines.grid import error_reply
from simulation.engines.inline import InlineGrid
from tests.machines.budgets import search, searched
from tests.machines.conftest import BANKS

CONFIGS = [
    {},
    {"privacy.epsilon": float("inf")},
    {"federation.robust": "median"},
    {"federation.institutions-per-round": 2},
]
VALID, SILENT = "honest", "silent"
PRIVACY = [
    {"steps": 0, "noise_multiplier": -1.0},
    {"noise_multiplier": math.nan},
    {"noise_multiplier": 1e-200},
    {"noise": "none"},
    {"sample_rate": 0.0},
    {"delta": 0.0},
    {"delta": 0.999},
    {"epsilon": math.nan},
    {"epsilon": -1.0},
    {"epsilon": 1e9},
    {"steps": 10**9},
]
"""Records of spending that no institution can make."""
FORGERIES = [
    *("nan", "huge", "wrong shape", "a part only", "nothing", "no adapter", "cut off", "text"),
    *("another name", "another round", "stale", "another run", "an earlier run", "size", "metrics"),
    *("refusal", "strange refusal", "error", "late", "no record", *range(len(PRIVACY))),
]


class Killed(BaseException):
    """The server's process ends here."""


class ScriptedGrid(InlineGrid):
    """Institutions answer as they do; the script says what arrives of it.

    Args:
        config: The run.
        script: For each round of this grid's life: pairs of institution and what it does, in order,
            and how many replies come at a time.
        dies: After so many deliveries the server dies; None: never.
        clock: What the server waits by.
        past: Replies of earlier runs and rounds by node, which are added to.
    """

    def __init__(self, config, script, dies, clock, past):
        super().__init__(app, len(BANKS), config.flat())
        self._script, self._dies, self._clock, self._past = list(script), dies, clock, past
        self._queue, self._late, self._orders = [], [], {}
        self.said = {}  # round -> institution -> what it did

    def push_messages(self, messages):
        """Of a round: have the institutions answer, and line up what will arrive."""
        messages = list(messages)
        ids = super().push_messages(messages)
        if messages and messages[0].metadata.message_type == MessageType.TRAIN:
            self._orders = dict(zip(ids, messages, strict=True))
            self._line_up(int(messages[0].metadata.group_id))
        return ids

    def pull_messages(self, message_ids):
        """The next replies of the script."""
        if not self._orders or not self._orders.keys() & set(message_ids):
            return super().pull_messages(message_ids)
        if self._dies is not None:
            self._dies -= 1
            if self._dies < 0:
                raise Killed
        if not self._queue:
            self._clock.sleep(10_000.0)
            return []
        return self._queue.pop(0)

    def _line_up(self, number):
        honest, left = {}, list(self._orders)
        while left:
            for reply in super().pull_messages(left):
                left.remove(reply.metadata.reply_to_message_id)
                honest[reply.metadata.src_node_id] = reply
        orders = {message.metadata.dst_node_id: message for message in self._orders.values()}
        actions, rest, at_once = self._script.pop(0) if self._script else ([], VALID, 1)
        todo = [(node, what) for node, what in actions if node in honest]
        todo += [(node, rest) for node in honest if node not in dict(todo)]
        arriving, self._late = self._late, []
        said = self.said.setdefault(number, defaultdict(set))
        for node, what in todo:
            said[BANKS[node - 1]].add(what)
            if what == "late":
                self._late.append(honest[node])
            elif what != SILENT:
                arriving.append(self._reply(what, node, orders[node], honest[node], number))
        for node, reply in honest.items():
            self._past[node].append(reply.content)
        self._queue = [arriving[i : i + at_once] for i in range(0, len(arriving), at_once)]

    def _reply(self, what, node, order, honest, number):
        if what == "error":
            return error_reply(order, 5, "the node is away")
        content = honest.content if what == VALID else self._forged(what, node, honest, number)
        return Message(content, reply_to=order)

    def _forged(self, what, node, honest, number):
        """The honest answer, made invalid."""
        update = wire.unpack_update(honest.content)
        change = lambda **values: wire.pack_update(dataclasses.replace(update, **values))  # noqa: E731
        tensors = dict(update.adapter)
        first = next(iter(tensors))
        if isinstance(what, int):
            record = update.privacy
            if record is None:  # DP is off: any record is one too many
                return change(metrics={"a": 1.0})
            return change(privacy=dataclasses.replace(record, **PRIVACY[what]))
        if what in ("stale", "an earlier run"):
            # what the institution said in an earlier round, or in another run's last one
            return self._past[node][-1] if self._past[node] else change(round=number + 1)
        if what == "a part only":
            del tensors[first]
        elif what in ("nan", "huge"):
            value = math.nan if what == "nan" else 1e9
            tensors[first] = torch.full_like(tensors[first], value)
        elif what == "wrong shape":
            tensors[first] = tensors[first][:1, :1]
        if what in ("a part only", "nan", "huge", "wrong shape"):
            return change(adapter=AdapterState(tensors))
        return {
            "nothing": lambda: RecordDict(),
            "no adapter": lambda: RecordDict({"update": honest.content["update"]}),
            "cut off": lambda: RecordDict(
                {**dict(change()), "adapter": _cut_off(honest.content["adapter"])}
            ),
            "text": lambda: RecordDict(
                {**dict(change()), "update": ConfigRecord({"institution": "x", "round": "1"})}
            ),
            "another name": lambda: change(institution=BANKS[node % len(BANKS)]),
            "another round": lambda: change(round=number + 1),
            "another run": lambda: change(run="0" * 32),
            "size": lambda: change(size=-1.0),
            "metrics": lambda: change(metrics={f"m{i}": 1.0 for i in range(1000)}),
            "refusal": lambda: wire.pack_refusal("guard"),
            "strange refusal": lambda: wire.pack_refusal("\x1b[2J" * 1000),
            "no record": lambda: change(privacy=None) if update.privacy else RecordDict(),
        }[what]()


def _cut_off(adapter):
    (array,) = adapter.values()
    whole = array.data
    return ArrayRecord(
        {"adapter": dataclasses.replace(array, data=whole[:-7], shape=(len(whole) - 7,))}
    )


actions = st.lists(
    st.tuples(
        st.integers(1, len(BANKS)),
        st.one_of(st.just(VALID), st.sampled_from(FORGERIES)),
    ),
    max_size=5,
)
round_scripts = st.tuples(
    actions, st.sampled_from([VALID, VALID, SILENT, "error"]), st.integers(1, 4)
)


class ServerMachine(RuleBasedStateMachine):
    """Runs one after the other, by servers that die and go on."""

    make_config = None
    clock = None

    def __init__(self):
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp())
        self.number = 0
        self.past = defaultdict(list)

    def teardown(self):
        shutil.rmtree(self.scratch)

    @initialize(changes=st.sampled_from(CONFIGS))
    def begin(self, changes):
        self.number += 1
        self.directory = self.scratch / f"run{self.number}"
        self.said = {}
        places = {
            "run-dir": str(self.directory),
        }
        self.config = type(self).make_config(**changes, **places)

    @rule(
        script=st.lists(round_scripts, max_size=3),
        dies=st.one_of(st.none(), st.integers(0, 8)),
        then=st.sampled_from(CONFIGS),
    )
    def a_server(self, script, dies, then):
        """A server starts or goes on; a run that ends makes room for another."""
        grid = ScriptedGrid(self.config, script, dies, self.clock, self.past)
        failed = ended = False
        try:
            Federation(grid, self.config).run()
            ended = True
        except Killed:
            pass
        except RunFailed:
            failed = True
        self.said |= grid.said
        lines = self._check_lines(killed=not (ended or failed))
        if failed:
            assert lines and lines[-1]["updates"] == 0, "a run was given up that had updates"
        self._check_charges()
        if ended:
            self._check_results(lines)
            self.begin(then)

    def _check_lines(self, *, killed):
        lines = read_records(self.directory)
        assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
        state = RunDirectory(self.directory).latest()
        assert state is not None
        assert state.round == len(lines)
        assert all(torch.isfinite(tensor).all() for tensor in state.adapter.values())
        for line in lines:
            said, rejected = self.said[line["round"]], line["aggregation"]["rejected"]
            assert len(said) == line["asked"] == len(line["institutions"])
            valid = {name for name, what in said.items() if what == {VALID}}
            possible = {name for name, what in said.items() if VALID in what}
            assert len(valid) <= line["updates"] <= len(possible), (said, line)
            assert said.keys() - possible <= rejected.keys(), (said, rejected)
            assert not rejected.keys() & valid, (said, rejected)
            assert line["updates"] + len(rejected) == line["asked"]
            assert len(json.dumps(line)) < 10_000
        assert "\x1b" not in (self.directory / "rounds.jsonl").read_text()
        return lines

    def _check_charges(self):
        for path in (self.scratch / "ledgers").glob("*.db"):
            with Ledger.open(path) as ledger:
                charged = [(e["run"], e["round"]) for e in ledger.show()["entries"]]
            assert len(charged) == len(set(charged)), "a round was charged twice"

    def _check_results(self, lines):
        privacy = json.loads((self.directory / "privacy.json").read_text())
        result = json.loads((self.directory / "result.json").read_text())
        AdapterState.open(self.directory / "adapter")
        assert result["rounds"] == len(lines)
        if not self.config.privacy.enabled:
            return
        for name, spent in privacy["institutions"].items():
            asked = sum(name in line["institutions"] for line in lines)
            assert 0 < spent["epsilon"] <= self.config.privacy.epsilon * (1 + 1e-6)
            assert spent["delta"] == self.config.privacy.delta
            assert spent["rounds_asked"] == asked
        assert 0 < result["epsilon_max"] <= self.config.privacy.epsilon * (1 + 1e-6)


@searched(fixed=(4, 5), long=(100, 12))
def test_a_run_ends_or_is_given_up_whatever_institutions_answer(budget, server_world):
    search(ServerMachine, budget, **server_world)

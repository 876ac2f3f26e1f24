"""The federation's rounds: each is `Federation.ask`, `aggregate`, `step` and `record`."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora import flower_internals, startup
from fedlora.config import plugins
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.errors import InputError, Refusal
from fedlora.models import trainable
from fedlora.models.adapters import PARTS, AdapterState
from fedlora.models.model_files import Origin
from fedlora.privacy.budget import delta_of
from fedlora.runs import model_card
from fedlora.runs.run_files import read_records
from fedlora.secure import secure_order
from fedlora.wire import released, wire
from fedlora.wire.messages import EvaluateOrder, Query, Release, TrainOrder
from server import (
    aggregation,
    answers,
    binding,
    evaluation,
    joining,
    limits,
    plugged,
)
from server.aggregation import Aggregated, Report
from server.population import population_of
from server.privacy_statement import epsilon_alone, largest_epsilon, statement
from server.replies import Replies
from server.roster import Roster, patience
from server.run_directory import OTHER, RunDirectory, RunState
from server.secure_session import SecureSession
from server.spending import Spending
from server.start import head_start, origins, start_adapter
from strategies import base, server_optimizer
from strategies.base import Round

log = logging.getLogger("fedlora.server")

ONLINE_PAUSE = 2.0
"""Seconds between two looks for institutions that are away."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The orders of one round.

    Args:
        started: When the round began, by ``time.monotonic``.
        this_round: The round.
        names: Node -> institution.
        report: The figures that the orders ask for.
        messages: One for each node; the list is empty once they are sent.
        sent: Institution -> bytes of the adapter in its order.
    """

    started: float
    this_round: Round
    names: Mapping[int, str]
    report: Sequence[str]
    messages: list[Message]
    sent: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a round's aggregation.

    Args:
        aggregated: The aggregated adapter.
        report: What may be said of the replies.
        skipped: Whether the round changes nothing.
        refused: The code of the reason why the aggregate was refused; empty where it was not.
        privacy: Institution -> the spending that it reported.
        reported: Institution -> the figures that the orders asked for.
    """

    aggregated: Aggregated
    report: Report
    skipped: bool
    refused: str
    privacy: Mapping[str, Mapping[str, Any]]
    reported: Mapping[str, Mapping[str, float]]


class Federation:
    """One run of a federation, from its first round, or from its checkpoint, to its results.

    Args:
        grid: To the institutions.
        config: The run.

    Raises:
        InputError: When the configuration does not fit the data or the budget, or the run's
            directory holds something else. Nothing is sent before. Caches may be written, and of a
            resumed run ``rounds.jsonl`` may be cut back to its checkpoint.
    """

    def __init__(self, grid: Grid, config: RunConfig) -> None:
        self.callbacks = plugged.callbacks(config)
        self.grid, self.config = grid, config
        self.population = population_of(config)
        size = self.population.size
        self.participations = config.federation.participations(size)
        self.strategy = plugged.strategy(config.federation)
        self.session = (
            SecureSession(grid, config, self.population.names)
            if config.privacy.shares_noise
            else None
        )
        self.aggregation = aggregation.choose(
            config, size, self.participations, self.strategy, self.session
        )
        self.spending = (
            Spending(config=config, participations=self.participations)
            if config.privacy.enabled
            else None
        )
        self.signer = binding.signer(config)
        self.directory = RunDirectory(Path(config.run_dir))
        resumed = self.directory.check(config)
        self.work = trainable.load(config, self.population.labels)
        self.state = self._first_state(resumed)
        if config.deployed:
            most = limits.most_reply_bytes(self.work.start)
            flower_internals.stream_replies(most, config.federation.timeout)
        if config.deployed and self.population.held_out is None:
            self.work = trainable.without_weights(self.work)
            gc.collect()  # a model is full of cycles
            startup.trim_heap()
        query = Query(
            run=self.state.run,
            first=self.state.round == 0 and not self.directory.asked(1),
            participations=self.participations,
        )
        self.roster = Roster(grid, config, query, self.population.names)
        self.measured: dict[str, Any] = {}
        self.idle_rounds = limits.idle_rounds(read_records(self.directory.path))

    def run(self) -> None:
        """Run the rounds that are left, and write the results."""
        federation = self.config.federation
        ended = self.config.deployed and 0 < federation.rounds <= self.state.round
        # Results need nobody, but parts that stay at institutions go with no adapter handed out.
        least = 0 if ended and not federation.traits.local_parts else self.least
        unset = self.session is not None and not ended and not self.session.is_set_up
        self.roster.wait(self.population.size, least, all_needed=unset)
        if self.state.round == 0 and self.config.privacy.enabled:
            self.roster.check_budgets(self.least)
            if self.config.deployed:
                self.roster.check_noise(self.participations)
        if self.state.round == 0:
            self.directory.create(self.config)
            self.directory.save(self.state)
        if self.session is not None and not ended:
            parameters = secure_order.parameters(self.state.adapter, self.config)
            self.session.set_up(self.state.run, parameters, self.nodes(), self.population.size)
        played = False
        while self.state.round < self.config.federation.rounds:
            online = self.awaited()
            names = self.sample(online)
            limits.check_online(online, self.least, self.roster.left_out)
            if len(names) < self.least:
                log.warning(
                    "the run ends after round %d: a round needs %d institutions, and of those that "
                    "are online %d were not yet asked for the %d rounds that they planned for",
                    self.state.round,
                    self.least,
                    len(names),
                    self.participations,
                )
                asked = self.asked(self.state.round + 1)  # by a process that ended in that round
                self.state = dataclasses.replace(self.state, asked=asked)
                break
            record = self.play_round({online[name]: name for name in names})
            record["all_asked"], played = len(names) == len(online), True
            self.directory.append(record)
            self.directory.save(self.state)
            for callback in self.callbacks:
                callback(record)
            log.info(
                "round %d of %d: %d of %d updates in %.1f s; rejected: %s",
                record["round"],
                self.config.federation.rounds,
                record["updates"],
                record["asked"],
                record["seconds"],
                record["aggregation"]["rejected"] or "none",
            )
            self.roster.note(record["aggregation"]["rejected"], names)
            idle = limits.is_idle(record)
            self.idle_rounds = self.idle_rounds + 1 if idle else 0
            last = self.state.round >= self.config.federation.rounds
            limits.check_progress(record, self.idle_rounds, last=last)
        lines = read_records(self.directory.path)
        if not played and lines:  # the process that played the last round may have failed on it
            limits.check_progress(lines[-1], self.idle_rounds, last=True)
        self.finish()

    @property
    def least(self) -> int:
        """The least number of institutions with which a round can count."""
        return self.aggregation.least_asked

    def online(self) -> dict[str, int]:
        """Institution -> node, for those that are online and may be asked."""
        online = self.roster.online()
        if self.session is None:
            return online
        return {name: node for name, node in online.items() if name in self.session.members}

    def awaited(self) -> dict[str, int]:
        """`online`, where a deployment waits a while for institutions that the next round needs."""
        online, seconds = self.online(), self.config.federation.timeout
        if not self.config.deployed or self.ready(online):
            return online
        log.warning(
            "%d institutions are online, of which round %d may ask %d, and it needs %d; waiting "
            "for up to %.0f s",
            len(online),
            self.state.round + 1,
            len(self.sample(online)),
            self.least,
            seconds,
        )
        deadline = time.monotonic() + seconds
        while not self.ready(online) and time.monotonic() < deadline:
            time.sleep(ONLINE_PAUSE)
            online = self.online()
        return online

    def ready(self, online: Mapping[str, int]) -> bool:
        """Whether the next round can count with these institutions, or nobody else is missing."""
        return len(self.sample(online)) >= self.least or len(online) >= self.population.size

    def sample(self, online: Mapping[str, int]) -> list[str]:
        """The institutions of the next round, among those that are online."""
        return base.sample(
            {name: self.state.asked.get(name, 0) for name in online},
            per_round=self.config.federation.institutions_per_round,
            cap=self.participations,
            seed=self.config.seed,
            round_number=self.state.round + 1,
        )

    def play_round(self, names: Mapping[int, str]) -> dict[str, Any]:
        """One round with these institutions (node -> name); returns its line of rounds.jsonl."""
        orders = self.ask(names)
        self.directory.append_orders(orders.this_round.number, names.values())
        outcome = self.aggregate(orders)
        self.state = self.step(orders, outcome)
        return self.record(orders, outcome)

    def ask(self, names: Mapping[int, str]) -> Orders:
        """The orders of the next round, for these institutions (node -> name)."""
        started, number, config = time.monotonic(), self.state.round + 1, self.config
        this_round = self._round(number, len(names))
        start = self.strategy.start(this_round)
        this_round = dataclasses.replace(this_round, sent=start)
        quiet = config.privacy.under_dp or config.deployed
        report = () if quiet else ("loss",)
        order = TrainOrder(
            run=self.state.run,
            round=number,
            participations=self.participations,
            base=self.work.base.digest,
            report=report,
            parts=this_round.parts,
            kept=this_round.local_parts,
            adapter=start,
        )
        packed = wire.pack_order(order, wire.pack_adapter(start))
        contents = dict.fromkeys(names.values(), packed)
        if self.session is not None:
            masked = self.session.masked_orders(number, secure_order.digest(order, config), names)
            contents = {name: wire.with_masked_order(packed, masked[name]) for name in contents}
        group, ttl = str(number), config.federation.timeout
        return Orders(
            started=started,
            this_round=this_round,
            names=names,
            report=report,
            messages=[
                Message(contents[name], node, MessageType.TRAIN, group_id=group, ttl=ttl)
                for node, name in names.items()
            ],
            sent={name: wire.adapter_bytes(content) for name, content in contents.items()},
        )

    def aggregate(self, orders: Orders) -> Outcome:
        """Send the orders and aggregate the replies.

        A fault of one reply concerns its institution only.
        """
        this_round = orders.this_round
        replies = Replies(
            self.grid,
            orders.messages,
            orders.names,
            this_round,
            report=orders.report,
            spending=self.spending,
            timeout=patience(self.config),
        )
        refused = ""
        try:
            aggregated = self.aggregation.aggregate(this_round, replies)
            largest = base.largest(aggregated.adapter.only(PARTS))
            if largest > base.MAX_VALUE:
                raise Refusal(
                    "too-large", f"the aggregate reached {largest:g}, above {base.MAX_VALUE:g}"
                )
        except Refusal as refusal:
            log.warning("round %d changes nothing: %s", this_round.number, refusal)
            aggregated, refused = Aggregated(adapter=AdapterState({})), refusal.code
        report = self.aggregation.report(this_round, replies, orders.names.values())
        return Outcome(
            aggregated=aggregated,
            report=report,
            skipped=bool(refused) or report.updates < self.least,
            refused=refused,
            privacy=replies.privacy,
            reported=replies.reported,
        )

    def step(self, orders: Orders, outcome: Outcome) -> RunState:
        """The state after the round: the server optimizer's step, and all counts.

        Raises:
            RunFailed: If the step left an adapter that no update can follow.
        """
        state, federation, number = self.state, self.config.federation, orders.this_round.number
        adapter, moments = state.adapter, state.moments
        if not outcome.skipped:
            adapter, moments = server_optimizer.step(
                federation.server_optimizer,
                federation.server_learning_rate,
                state.adapter,
                outcome.aggregated.adapter,
                moments,
                head_learning_rate=federation.server_head_learning_rate,
            )
            limits.check_adapter(adapter, orders.this_round, residuals=federation.traits.residuals)
        average, averaged = dict(state.average), state.averaged
        if number >= federation.averaged_from:
            averaged += 1
            average = {k: average.get(k, 0.0) + v.double() for k, v in adapter.items()}
        return dataclasses.replace(
            state,
            round=number,
            adapter=adapter,
            moments=moments,
            asked=self.asked(number),
            average=average,
            averaged=averaged,
            privacy={**state.privacy, **outcome.privacy},
        )

    def asked(self, number: int) -> dict[str, int]:
        """Institution -> for how many rounds it was asked, with a round that the state lacks.

        That counts those whom an earlier try at this round asked: they may have been charged.
        """
        asked = dict(self.state.asked)
        return asked | {name: asked.get(name, 0) + 1 for name in self.directory.asked(number)}

    def record(self, orders: Orders, outcome: Outcome) -> dict[str, Any]:
        """Evaluate the new state; the round's line of ``rounds.jsonl``."""
        state, report, number = self.state, outcome.report, orders.this_round.number
        every, self.measured = self.config.federation.evaluate_every, {}
        if number % every == 0 or number == self.config.federation.rounds:
            self.measured = self.measure()
        rejected = {**report.rejected, **outcome.aggregated.rejected}
        epsilons = self.aggregation.epsilons(state)
        accuracies = self.measured.get("institutions", {})
        seconds = time.monotonic() - orders.started
        self.state = dataclasses.replace(state, seconds=state.seconds + seconds)
        enabled = self.config.privacy.enabled
        return {
            "round": number,
            "seconds": round(seconds, 4),
            "asked": len(orders.names),
            "updates": report.updates,
            "skipped": outcome.skipped,
            "aggregation": {
                "rejected": dict(sorted(rejected.items())),
                **({"refused": outcome.refused} if outcome.refused else {}),
            },
            "metrics": {k: v for k, v in self.measured.items() if k != "institutions"},
            "epsilon_max": self.aggregation.largest_epsilon(state) if enabled else "inf",
            **self.aggregation.round_record(state),
            "institutions": {
                name: {
                    "sent": orders.sent[name],
                    "received": report.received.get(name, 0),
                    **({"epsilon": epsilons[name]} if name in epsilons else {}),
                    **({"accuracy": accuracies[name]} if name in accuracies else {}),
                }
                for name in orders.names.values()
            },
            "reported": dict(sorted(outcome.reported.items())),
        }

    def measure(self, *, save: bool = False) -> dict[str, Any]:
        """Metrics on the pooled held-out rows, and each institution's accuracy on its own.

        This is the experimenter's measurement on rows that are set aside. It is not part of the
        protocol and says nothing of training records.

        Args:
            save: Whether institutions that have an adapter of their own write it down.
        """
        federation, state = self.config.federation, self.state
        if not federation.traits.local_parts:
            return evaluation.evaluate_global(self.work, state.final_adapter(), self.population)
        if self.config.deployed:  # institutions give no figures of their own rows there
            return {"institutions": {}}
        order = EvaluateOrder(run=state.run, round=state.round, save=save, adapter=state.adapter)
        return evaluation.evaluate_own(self.grid, order, self.nodes(), self.config)

    def nodes(self) -> dict[int, str]:
        """Node -> institution, for the institutions that are online."""
        return {node: name for name, node in self.roster.online().items()}

    def compare_at_home(self, adapter: AdapterState) -> dict[str, Any]:
        """The models that institutions train at home, compared; empty where none are trained.

        Args:
            adapter: The released adapter.
        """
        config, state, population = self.config, self.state, self.population
        chosen = {population.names[i] for i in config.at_home(population.size)}
        if not chosen:
            return {}
        return joining.measure(
            self.grid,
            EvaluateOrder(run=state.run, round=state.round, save=True, adapter=adapter),
            {node: name for node, name in self.nodes().items() if name in chosen},
            config,
            population,
        )

    def hand_out(self, adapter: AdapterState, behind: Sequence[Origin]) -> dict[str, str]:
        """Write down the released adapter of a deployed run, and send it to its institutions.

        Args:
            adapter: The adapter.
            behind: The runs that it goes back to.

        Returns:
            Institution -> ``stored``, or the reason why it has no adapter; all registered ones.
        """
        config, state = self.config, self.state
        release = Release(
            run=state.run,
            name=self.directory.path.name,
            round=state.round,
            base=self.work.base.digest,
            origins=behind,
            adapter=adapter,
        )
        released.describe(self.directory.path / "adapter", release, config.public())
        stored, failed = answers.ask(
            self.grid, config, release, wire.RELEASED, self.nodes(), lambda name, answer: "stored"
        )
        absent = dict.fromkeys(state.asked, "offline") | self.roster.absent()
        return dict(sorted({**absent, **stored, **failed}.items()))

    def finish(self) -> None:
        """Write the final adapter, privacy.json and result.json."""
        config, state, work, population = self.config, self.state, self.work, self.population
        if config.federation.traits.local_parts or not self.measured:
            self.measured = self.measure(save=True)
        adapter = state.final_adapter()
        for draft in (self.directory.path / "adapter").glob(".*"):
            if draft.is_file():
                draft.unlink()  # of a killed process; privacy.json binds all files in the directory
        adapter.save(self.directory.path / "adapter", work.model)
        behind = origins(config)
        outcomes = self.hand_out(adapter, behind) if config.deployed else {}
        compared = self.compare_at_home(adapter)
        names = population.names or sorted(state.asked)
        level = self.aggregation.statement(state)
        privacy = statement(config, names, state, level, self.spending, follows=bool(behind))
        if config.plug_ins:
            privacy = {**privacy, "plug_ins": plugins.describe(config.plug_ins)}
        result = {
            **self.measured,
            **({"joining": compared} if compared else {}),
            **({"released": outcomes} if outcomes else {}),
            **({"origins": behind} if behind else {}),
            "epsilon_max": largest_epsilon(privacy) if config.privacy.enabled else float("inf"),
            "delta": self.largest_delta(privacy),
            **({"epsilon_alone_max": alone} if (alone := epsilon_alone(privacy)) else {}),
            "rounds": state.round,
            "seconds": round(state.seconds, 2),
            "run": state.run,
            "run_dir": str(self.directory.path),
            "base": {
                "name": config.model.name,
                "digest": work.base.digest,
                "dtype": self.work.base.dtype_name,
            },
            "labels": list(work.labels),
            **({"head": state.head} if state.head else {}),
            "population": population.size,
            "nonce": secrets.token_hex(16),
            "trained_parameters": sum(
                t.numel() for t in adapter.only(config.federation.traits.trained_parts).values()
            ),
            "counts": dict(population.counts),
            "findings": [
                dataclasses.asdict(finding)
                for finding in (*population.findings, *self.roster.findings())
            ],
        }
        model_card.write_adapter(self.directory.path / "adapter", config, work, result, privacy)
        with contextlib.suppress(InputError):  # the key was renewed meanwhile, or is the first one
            self.signer = binding.signer(config)
        self.directory.write_result(
            result,
            privacy,
            config,
            records=population.fingerprint,
            signer=self.signer,
        )

    def largest_delta(self, privacy: Mapping[str, Any]) -> float | None:
        """The largest delta of an institution; None without DP, or where none is known.

        A simulation counts institutions that did not report, too.

        Args:
            privacy: The content of privacy.json.
        """
        config = self.config
        if not config.privacy.enabled:
            return None
        if config.privacy.delta:
            return config.privacy.delta
        if config.deployed:
            known = [] if privacy["without_report"] else privacy["institutions"].values()
            return max((one["delta"] for one in known), default=None)
        return max(delta_of(config.privacy, units) for units in records.load(config).units)

    def _first_state(self, resumed: bool) -> RunState:
        """The newest checkpoint of a run that goes on; otherwise the state before round 1."""
        newest_only = self.aggregation.newest_checkpoint_only
        tokens = records.encoding(self.config)
        found = f"{self.work.base.digest}\n{self.population.fingerprint}\n{tokens}"
        if name := self.config.federation.own_code:
            own = plugins.describe([("federation.strategy", name)])
            found += f"\n{json.dumps(own)}"
        inputs = hashlib.sha256(found.encode()).hexdigest()
        state = self.directory.latest(newest_only=newest_only) if resumed else None
        if state is None:
            adapter = start_adapter(self.config, self.work)
            state = RunState.first(
                uuid.uuid4().hex,
                inputs,
                adapter,
                dtype=self.work.base.dtype_name,
                head=head_start(self.config, self.work, adapter),
            )
        if state.inputs != inputs:
            raise InputError(
                f"{self.directory.path} was run on other records, base weights or another "
                "tokenizer than data.source and model.name hold now, or with another "
                f"federation.strategy; restore them, or start anew with {OTHER}"
            )
        if state.dtype not in ("", self.work.base.dtype_name):
            log.warning(
                "the run was begun with the base model in %s, and here model.dtype %s is %s; its "
                "further rounds follow from other roundings",
                state.dtype,
                self.config.model.dtype,
                self.work.base.dtype_name,
            )
        privacy = {} if self.spending is None else self.spending.possible(state.privacy)
        return dataclasses.replace(state, privacy=privacy)

    def _round(self, number: int, asked: int) -> Round:
        """A round before its orders are made."""
        config, federation = self.config, self.config.federation
        parts, shared = federation.traits.parts_sent(number), config.privacy.shares_noise
        trained = self.state.adapter.only(parts)
        return Round(
            number=number,
            asked=asked,
            before=self.state.adapter,
            parts=parts,
            local_parts=federation.traits.local_parts,
            weighting=federation.weighting,
            words=sum(t.numel() for t in trained.values()) if shared else 0,
            sizes=self.roster.sizes() if shared else {},
            max_sizes=self.roster.max_sizes,
            alpha=config.adapter.alpha,
            rslora=config.adapter.method.endswith("rslora"),
            seed=config.seed,
            run=self.state.run,
        )

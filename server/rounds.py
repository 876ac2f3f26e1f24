"""The federation's rounds: each is `Federation.ask`, `aggregate`, `step` and `record`."""

import dataclasses
import gc
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora import flower_internals, startup
from fedlora.config.config import RunConfig
from fedlora.errors import Refusal
from fedlora.models import trainable
from fedlora.models.adapters import PARTS, AdapterState
from fedlora.runs.run_files import read_records
from fedlora.secure import secure_order
from fedlora.wire import wire
from fedlora.wire.messages import EvaluateOrder, Query, TrainOrder
from server import aggregation, binding, evaluation, exchange, finish, limits, plugged, start
from server.aggregation import Aggregated
from server.population import population_of
from server.replies import Replies
from server.roster import Roster, patience
from server.round_record import Orders, Outcome, line
from server.run_directory import RunDirectory, RunState
from server.secure_session import SecureSession
from server.spending import Spending
from strategies import base, server_optimizer
from strategies.base import Round

log = logging.getLogger("fedlora.server")

ONLINE_PAUSE = 2.0
"""Seconds between two looks for institutions that are away."""


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
        self.grid, self.config, private = grid, config, config.privacy
        self.callbacks = plugged.callbacks(config)
        self.population = population_of(config)
        size, names = self.population.size, self.population.names
        self.participations = cap = config.federation.participations(size)
        self.strategy = plugged.strategy(config.federation)
        self.session = SecureSession(grid, config, names) if private.shares_noise else None
        self.aggregation = aggregation.choose(config, size, cap, self.strategy, self.session)
        self.spending = Spending(config=config, participations=cap) if private.enabled else None
        self.signer = binding.signer(config)
        self.directory = RunDirectory(Path(config.run_dir))
        resumed = self.directory.check(config)
        self.work = trainable.load(config, self.population.labels)
        newest_only = self.aggregation.newest_checkpoint_only
        stored = self.directory.latest(newest_only=newest_only) if resumed else None
        self.state = start.state(config, self.work, self.population.fingerprint, stored)
        if self.spending is not None:
            possible = self.spending.possible(self.state.privacy)
            self.state = dataclasses.replace(self.state, privacy=possible)
        if config.deployed:
            most = limits.most_reply_bytes(self.work.start)
            flower_internals.stream_replies(most, config.federation.timeout)
        if config.deployed and self.population.held_out is None:
            self.work = trainable.without_weights(self.work)
            gc.collect()  # a model is full of cycles
            startup.trim_heap()
        first = self.state.round == 0 and not self.directory.asked(1)
        query = Query(run=self.state.run, first=first, participations=cap)
        self.roster = Roster(grid, config, query, names)
        self.measured: dict[str, Any] = {}
        self.present = 0  # institutions that were online when those of a round were chosen
        self.idle_rounds = limits.idle_rounds(read_records(self.directory.path))

    def run(self) -> None:
        """Run the rounds that are left, and write the results."""
        rounds, record = self.config.federation.rounds, None
        self.begin()
        while self.state.round < rounds and (names := self.chosen()):
            record = self.play_round(names)
            for callback in self.callbacks:
                callback(record)
            self.roster.note(record["aggregation"]["rejected"], names.values())
            self.idle_rounds = self.idle_rounds + 1 if limits.is_idle(record) else 0
            limits.check_progress(record, self.idle_rounds, last=self.state.round >= rounds)
        lines = read_records(self.directory.path)
        if record is None and lines:  # the process that played the last round may have failed on it
            limits.check_progress(lines[-1], self.idle_rounds, last=True)
        self.finish()

    def begin(self) -> None:
        """Wait for the institutions, check their budgets, and make the run's directory and keys."""
        federation, first = self.config.federation, self.state.round == 0
        ended = self.config.deployed and 0 < federation.rounds <= self.state.round
        # Results need nobody, but parts that stay at institutions go with no adapter handed out.
        least = 0 if ended and not federation.traits.local_parts else self.least
        unset = self.session is not None and not ended and not self.session.is_set_up
        self.roster.wait(self.population.size, least, all_needed=unset)
        if first and self.config.privacy.enabled:
            self.roster.check_budgets(self.least)
            if self.config.deployed:
                self.roster.check_noise(self.participations)
        if first:
            self.directory.create(self.config)
            self.directory.save(self.state)
        if self.session is not None and not ended:
            parameters = secure_order.parameters(self.state.adapter, self.config)
            self.session.set_up(self.state.run, parameters, self.nodes(), self.population.size)

    def chosen(self) -> dict[int, str]:
        """Node -> institution, for the next round; empty where the run ends before its last round.

        Raises:
            RunFailed: If too few institutions are online.
        """
        online = self.awaited()
        names, self.present = self.sample(online), len(online)
        limits.check_online(online, self.least, self.roster.left_out)
        if len(names) >= self.least:
            return {online[name]: name for name in names}
        log.warning(
            "the run ends after round %d: a round needs %d institutions, and of those that are "
            "online %d were not yet asked for the %d rounds that they planned for",
            self.state.round,
            self.least,
            len(names),
            self.participations,
        )
        asked = self.asked(self.state.round + 1)  # by a process that ended in that round
        self.state = dataclasses.replace(self.state, asked=asked)
        return {}

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
            "%d institutions are online, and round %d needs %d that may be asked; waiting for up "
            "to %.0f s",
            len(online),
            self.state.round + 1,
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
        outcome = self.aggregate(orders)
        self.state = self.step(orders, outcome)
        return self.record(orders, outcome)

    def ask(self, names: Mapping[int, str]) -> Orders:
        """Write down who is asked in the next round (node -> name), and send the orders."""
        started, number, config = time.monotonic(), self.state.round + 1, self.config
        this_round = self._round(number, len(names))
        adapter = self.strategy.start(this_round)
        report = () if config.privacy.under_dp or config.deployed else ("loss",)
        order = TrainOrder(
            run=self.state.run,
            round=number,
            participations=self.participations,
            base=self.work.base.digest,
            report=report,
            parts=this_round.parts,
            kept=this_round.local_parts,
            adapter=adapter,
        )
        packed = wire.pack_order(order, wire.pack_adapter(adapter))
        contents, collected = dict.fromkeys(names.values(), packed), False
        if self.session is not None:
            masked = self.session.masked_orders(number, secure_order.digest(order, config), names)
            contents = {name: wire.with_masked_order(packed, masked[name]) for name in contents}
            collected = self.session.is_collected(number)  # by an earlier process: asks nobody
        group, ttl = str(number), config.federation.timeout
        messages = [
            Message(contents[name], node, MessageType.TRAIN, group_id=group, ttl=ttl)
            for node, name in names.items()
        ]
        sent = {name: wire.adapter_bytes(content) for name, content in contents.items()}
        del contents, packed  # `exchange` holds no content of what it has sent
        self.directory.append_orders(number, names.values())
        return Orders(
            started=started,
            this_round=dataclasses.replace(this_round, sent=adapter),
            names=names,
            report=report,
            waiting={} if collected else exchange.send(self.grid, messages),
            sent=sent,
            all_asked=len(names) == self.present,
            under_dp=config.privacy.enabled,
        )

    def aggregate(self, orders: Orders) -> Outcome:
        """Aggregate the replies. A fault of one reply concerns its institution only."""
        this_round, refused = orders.this_round, ""
        replies = Replies(
            self.grid,
            orders.waiting,
            orders.names,
            this_round,
            report=orders.report,
            spending=self.spending,
            timeout=patience(self.config),
        )
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
        """Evaluate the new state; record the round's line of ``rounds.jsonl`` and the state."""
        federation, number = self.config.federation, orders.this_round.number
        due = number % federation.evaluate_every == 0 or number == federation.rounds
        self.measured = self.measure() if due else {}
        seconds = time.monotonic() - orders.started
        self.state = dataclasses.replace(self.state, seconds=self.state.seconds + seconds)
        record = line(orders, outcome, self.state, self.aggregation, self.measured, seconds)
        self.directory.append(record)
        self.directory.save(self.state)
        log.info(
            "round %d of %d: %d of %d updates in %.1f s; rejected: %s",
            number,
            federation.rounds,
            record["updates"],
            record["asked"],
            seconds,
            record["aggregation"]["rejected"] or "none",
        )
        return record

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

    def finish(self) -> None:
        """Write the final adapter, privacy.json and result.json."""
        if self.config.federation.traits.local_parts or not self.measured:
            self.measured = self.measure(save=True)
        finish.write(
            finish.Ended(
                grid=self.grid,
                config=self.config,
                state=self.state,
                work=self.work,
                population=self.population,
                roster=self.roster,
                directory=self.directory,
                level=self.aggregation.statement(self.state),
                spending=self.spending,
                measured=self.measured,
                signer=self.signer,
            )
        )

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

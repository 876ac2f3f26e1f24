"""The federation's rounds: who is asked, what counts, what is kept.

One round reads top to bottom in `_round`.
"""

import dataclasses
import hashlib
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora import trainable, wire
from fedlora.adapters import PARTS, AdapterState
from fedlora.config import KEPT, RESIDUALS, RunConfig
from fedlora.errors import InputError, Refusal
from fedlora.trainable import Trainable
from server import evaluation, institution_privacy, tracking
from server import population as populations
from server.institution_privacy import InstitutionMechanism
from server.population import Population
from server.privacy_statement import largest_epsilon, statement
from server.replies import Replies
from server.roster import Roster, RunFailed, patience, reasons
from server.run_directory import RunDirectory, RunState
from server.spending import Spending
from strategies import STRATEGIES, base, robust, server_optimizer
from strategies.base import Round
from strategies.diagnostics import Watch

log = logging.getLogger("fedlora.server")

MOST_FRUITLESS = 3
"""Rounds in a row without any update after which a run ends that asks a part of the institutions;
where all were asked, it ends after the first."""
LARGEST_ADAPTER = 400 * 10**6
"""Bytes of an adapter that a deployment takes: what went through Flower's SuperLink with its
database on disk; at 1 GB it locked itself out."""


def run(grid: Grid, config: RunConfig) -> None:
    """Run, or continue, the whole federation and write its results.

    Raises:
        InputError: Before anything is written, when the configuration does not fit the data or the
            budget.
        RunFailed: When no institution is left; the last checkpoint stays.
    """
    tracking.check(config)
    population = populations.of(config)
    cap = base.participations(
        config.federation.rounds, population.size, config.federation.institutions_per_round
    )
    mechanism = institution_privacy.plan(config, population.size, cap)
    spending = Spending(config=config, participations=cap) if config.privacy.enabled else None
    directory = RunDirectory(Path(config.run_dir))
    resumed = directory.check(config)
    work = trainable.load(config, population.labels)
    if config.deployed:
        _check_size(config, work.start)
    inputs = hashlib.sha256(f"{work.base.digest}\n{population.fingerprint}".encode()).hexdigest()
    state = (directory.latest(newest_only=mechanism is not None) if resumed else None) or RunState(
        run=uuid.uuid4().hex,
        inputs=inputs,
        round=0,
        adapter=work.start,
        moments={},
        asked={},
        average={},
        averaged=0,
        privacy={},
        seconds=0.0,
    )
    if state.inputs != inputs:
        raise InputError(
            f"{directory.path} was run on other records or base weights than data.source and "
            "model.name hold now; restore them, or start anew with another --out"
        )
    state = dataclasses.replace(
        state, privacy={} if spending is None else spending.possible(state.privacy)
    )
    roster = Roster(
        grid, config, wire.Query(run=state.run, first=state.round == 0, participations=cap)
    )
    roster.wait(population.size)
    if state.round == 0 and config.privacy.enabled:
        roster.check_budgets()
    tracked = tracking.Tracking(config, state.run)
    if state.round == 0:
        directory.create(config)
        directory.save(state)
    measured: dict[str, Any] = {}
    fruitless = 0
    while state.round < config.federation.rounds:
        nodes = roster.online()
        chosen = _choose(config, nodes, state, cap)
        if nodes and not chosen:
            log.warning(
                "the run ends after round %d: every institution that is here was asked for the "
                "%d rounds that it planned for",
                state.round,
                cap,
            )
            break
        asked = {nodes[name]: name for name in chosen}
        state, record, measured = _round(
            grid, config, asked, roster, state, cap, mechanism, spending, work, population
        )
        directory.append(record)
        directory.save(state)
        tracked.round(record)
        rejected: dict[str, str] = record["aggregation"]["rejected"]
        log.info(
            "round %d of %d: %d of %d updates in %.1f s; rejected: %s",
            state.round,
            config.federation.rounds,
            record["updates"],
            record["asked"],
            record["seconds"],
            rejected or "none",
        )
        fruitless = 0 if record["updates"] else fruitless + 1
        if fruitless and (len(chosen) == len(nodes) or fruitless == MOST_FRUITLESS):
            diverged = "too-large" in rejected.values()
            raise RunFailed(
                f"round {state.round}: no institution sent a valid update ({reasons(rejected)}); "
                + ("training diverged: lower the learning rates; " if diverged else "")
                + "the last checkpoint is kept"
            )
    if config.federation.strategy in KEPT or not measured:
        measured = _measured(grid, config, roster, state, work, population, save=True)
    _finish(directory, config, state, mechanism, spending, work, population, measured)
    tracked.end()


def _check_size(config: RunConfig, adapter: AdapterState) -> None:
    """Refuse an adapter that would not reach the institutions, before they are asked anything."""
    size = sum(4 * tensor.numel() for tensor in adapter.values())  # sent as float32
    if size > LARGEST_ADAPTER:
        raise InputError(
            f"the adapter has {size / 10**6:.0f} MB, and a deployment takes at most "
            f"{LARGEST_ADAPTER / 10**6:.0f} MB; lower adapter.rank (now {config.adapter.rank}) or "
            "name fewer adapter.target-modules"
        )


def _choose(config: RunConfig, nodes: Mapping[str, int], state: RunState, cap: int) -> list[str]:
    """The institutions of the next round, among those that are here."""
    return base.sample(
        {name: state.asked.get(name, 0) for name in nodes},
        per_round=config.federation.institutions_per_round,
        cap=cap,
        seed=config.seed,
        round=state.round + 1,
    )


def _round(
    grid: Grid,
    config: RunConfig,
    nodes: Mapping[int, str],
    roster: Roster,
    state: RunState,
    cap: int,
    mechanism: InstitutionMechanism | None,
    spending: Spending | None,
    work: Trainable,
    population: Population,
) -> tuple[RunState, dict[str, Any], dict[str, Any]]:
    """One round: ask, aggregate what arrives, evaluate.

    Args:
        grid: To the institutions.
        config: The run.
        nodes: Node -> name of the institutions to ask.
        roster: Knows their ranks.
        state: After the last round.
        cap: The most rounds that an institution is asked for.
        mechanism: Of institution-level DP, when it is on.
        spending: Of DP at the institutions, when it is on.
        work: The base model, for evaluation.
        population: Its held-out rows, for evaluation.

    Returns:
        The state after this round, its line of ``rounds.jsonl``, and what was measured, if it was.
    """
    started, number, federation = time.monotonic(), state.round + 1, config.federation

    # 1. Ask. One array record for each rank, shared by all messages.
    strategy = STRATEGIES[federation.strategy]
    this = Round(
        number=number,
        asked=len(nodes),
        before=state.adapter,
        parts=strategy.parts(number),
        kept=strategy.kept,
        weighting=federation.weighting,
        believed=roster.believed,
        alpha=config.adapter.alpha,
        rslora=config.adapter.method.endswith("rslora"),
        residual_rank=federation.residual_rank,
        longest=federation.max_update_norm,
        seed=config.seed,
        run=state.run,
    )
    ranks = {name: roster.rank(node) for node, name in nodes.items()}
    starts = {rank: strategy.start(this, rank) for rank in sorted(set(ranks.values()))}
    this = dataclasses.replace(this, sent={name: starts[rank] for name, rank in ranks.items()})
    quiet = config.privacy.enabled or config.privacy.hides_institutions or config.deployed
    report = () if quiet else ("loss",)
    orders = {
        rank: wire.TrainOrder(
            run=state.run,
            round=number,
            participations=cap,
            base=work.base.digest,
            report=report,
            parts=this.parts,
            kept=this.kept,
            adapter=start,
        )
        for rank, start in starts.items()
    }
    arrays = {rank: wire.pack_adapter(start) for rank, start in starts.items()}
    messages = {
        name: Message(
            wire.pack_order(orders[ranks[name]], arrays[ranks[name]]),
            node,
            MessageType.TRAIN,
            group_id=str(number),
            ttl=federation.timeout,
        )
        for node, name in nodes.items()
    }
    sent = {name: wire.adapter_bytes(message.content) for name, message in messages.items()}

    # 2. Aggregate what arrives. Whatever is wrong with one answer concerns that institution only.
    replies = Replies(
        grid,
        list(messages.values()),
        nodes,
        this,
        report=report,
        spending=spending,
        timeout=patience(config),
    )
    watch = Watch(this)
    try:
        aggregated, rejected = _aggregate(config, mechanism, this, replies, watch)
        skipped = _counted(replies, mechanism) < federation.min_updates
        if (largest := base.largest(aggregated.only(PARTS))) > this.limit:
            raise Refusal("too-large", f"the aggregate reached {largest:g}, above {this.limit:g}")
    except Refusal as refusal:
        log.warning("round %d changes nothing: %s", number, refusal)
        aggregated, rejected, skipped = AdapterState({}), {}, True

    # 3. Step.
    adapter, moments = state.adapter, state.moments
    if not skipped:
        adapter, moments = server_optimizer.step(
            federation.server_optimizer,
            federation.server_learning_rate,
            state.adapter,
            aggregated,
            moments,
        )
        if problem := adapter.validate_against(
            state.adapter, residual=federation.strategy in RESIDUALS
        ):
            raise RunFailed(
                f"round {number}: the server optimizer left {problem}; lower "
                "federation.server-learning-rate. The last checkpoint is kept"
            )
        if (largest := base.largest(adapter.only(PARTS))) > this.limit:
            raise RunFailed(
                f"round {number}: the global adapter reached {largest:g}, and beyond "
                f"{this.limit:g} no update counts; lower federation.server-learning-rate, or "
                "training.learning-rate. The last checkpoint is kept"
            )
    average, averaged = dict(state.average), state.averaged
    if number > federation.rounds - round(federation.average_last * federation.rounds):
        averaged += 1
        average = {k: average.get(k, 0.0) + v.double() for k, v in adapter.items()}

    # 4. Evaluate and record.
    spent = {**state.privacy, **replies.privacy}
    new = dataclasses.replace(
        state,
        round=number,
        adapter=adapter,
        moments=moments,
        asked={**state.asked, **{name: state.asked.get(name, 0) + 1 for name in nodes.values()}},
        average=average,
        averaged=averaged,
        privacy=spent,
    )
    received = replies.received
    if mechanism is not None:  # as if all had sent what they were asked for
        part = wire.array_bytes(wire.pack_adapter(this.before.only(this.parts)))
        received = dict.fromkeys(nodes.values(), part)
    measured: dict[str, Any] = {}
    every = federation.evaluate_every
    if every and (number % every == 0 or number == federation.rounds):
        measured = _measured(grid, config, roster, new, work, population)
    figures = {} if mechanism is not None or skipped else watch.figures(aggregated)
    seconds = time.monotonic() - started
    record = {
        "round": number,
        "seconds": round(seconds, 4),
        "asked": len(nodes),
        "updates": _counted(replies, mechanism),
        "skipped": skipped,
        "aggregation_error": figures.pop("error", None),
        "aggregation": {
            **figures,
            "rejected": {
                name: reason
                for name, reason in sorted({**replies.failed, **rejected}.items())
                if mechanism is None or name not in replies.invalid
            },
        },
        "metrics": {k: v for k, v in measured.items() if k != "institutions"},
        "epsilon_max": _epsilon_max(config, mechanism, spent),
        **(
            {"institution_epsilon": mechanism.spent(new.asked.values())}
            if mechanism is not None
            else {}
        ),
        "institutions": {
            name: {
                "sent": sent[name],
                "received": received.get(name, 0),
                **({"epsilon": spent[name]["epsilon"]} if name in spent and not mechanism else {}),
                **(
                    {"accuracy": measured["institutions"][name]}
                    if name in measured.get("institutions", {})
                    else {}
                ),
            }
            for name in nodes.values()
        },
        "reported": dict(sorted(replies.reported.items())),
    }
    return dataclasses.replace(new, seconds=state.seconds + seconds), record, measured


def _epsilon_max(
    config: RunConfig, mechanism: InstitutionMechanism | None, spent: Mapping[str, Any]
) -> float | str | None:
    """The most that an institution spent; where each one's part is hidden, may spend in all."""
    if not config.privacy.enabled:
        return "inf"
    if mechanism is not None:
        return config.privacy.epsilon
    return max((p["epsilon"] for p in spent.values()), default=None)


def _counted(replies: Replies, mechanism: InstitutionMechanism | None) -> int:
    """Updates that make a round: the valid ones.

    Under institution-level DP all that came, since whether one is valid follows from an
    institution's records; an invalid one counts as zero.
    """
    return replies.valid + (0 if mechanism is None else len(replies.invalid))


def _aggregate(
    config: RunConfig,
    mechanism: InstitutionMechanism | None,
    round: Round,
    replies: Replies,
    watch: Watch,
) -> tuple[AdapterState, dict[str, str]]:
    """The new value of what was trained, and who had no part in it and why.

    ``watch`` sees the updates, except under institution-level DP, which figures on each of them
    would bypass.

    Raises:
        Refusal: ``too-few-updates`` for the robust rule.
    """
    federation = config.federation
    strategy = STRATEGIES[federation.strategy]
    if mechanism is not None:
        updates = sorted((update for update, _ in replies), key=lambda u: u.institution)
        answered = _counted(replies, mechanism)
        return mechanism.aggregate(round, updates, answered) if answered else AdapterState({}), {}
    updates = watch.through(replies)
    if federation.robust == "none":
        return strategy.aggregate(round, updates), {}
    return robust.aggregate(
        round,
        updates,
        rule=federation.robust,
        byzantine=federation.byzantine,
        mean=strategy.aggregate,
    )


def final_adapter(state: RunState) -> AdapterState:
    """The adapter that a run releases: the last one, or the mean of the last ones."""
    if not state.averaged:
        return state.adapter
    return AdapterState({k: (v / state.averaged).float() for k, v in state.average.items()})


def _measured(
    grid: Grid,
    config: RunConfig,
    roster: Roster,
    state: RunState,
    work: Trainable,
    population: Population,
    *,
    save: bool = False,
) -> dict[str, Any]:
    """Metrics on the pooled held-out rows, and each institution's accuracy on its own.

    This is the experimenter's measurement on rows that are set aside. It is not part of the
    protocol and says nothing of training records. With ``save``, institutions that have an adapter
    of their own write it down.
    """
    if config.federation.strategy not in KEPT:
        return evaluation.of_one(work, final_adapter(state), population)
    order = wire.EvaluateOrder(run=state.run, round=state.round, save=save, adapter=state.adapter)
    nodes = {node: name for name, node in roster.online().items()}
    return evaluation.of_each(
        grid,
        order,
        nodes,
        rows=population.held_out_rows,
        labels=work.labels,
        timeout=config.federation.timeout,
        patience=patience(config),
    )


def _finish(
    directory: RunDirectory,
    config: RunConfig,
    state: RunState,
    mechanism: InstitutionMechanism | None,
    spending: Spending | None,
    work: Trainable,
    population: Population,
    measured: dict[str, Any],
) -> None:
    adapter = final_adapter(state)
    adapter.save(directory.path / "adapter", work.model)
    privacy = statement(config, population.names or sorted(state.asked), state, mechanism, spending)
    result = {
        **measured,
        "epsilon_max": largest_epsilon(privacy) if config.privacy.enabled else float("inf"),
        "delta": max((p["delta"] for p in state.privacy.values()), default=None),
        "rounds": state.round,
        "seconds": round(state.seconds, 2),
        "run_dir": str(directory.path),
        "base": {"name": config.model.name, "digest": work.base.digest},
        "labels": list(work.labels),
        "trained_parameters": sum(t.numel() for t in adapter.only(PARTS).values()),
        "counts": dict(population.counts),
    }
    directory.write_result(result, privacy)

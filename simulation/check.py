"""`fedlora check`: everything about a run that is known before it starts, without spending any.

The records are read and the base model is loaded as a run does it. Then a few records take one
training step, and a few held-out rows are predicted, for the expected time; their results are
dropped.
"""

import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora import files, processors
from fedlora.config.config import RunConfig
from fedlora.data import findings
from fedlora.data.findings import Finding
from fedlora.data.shards import Federation, Shard
from fedlora.errors import InputError, Refusal
from fedlora.privacy import accounting
from fedlora.privacy.budget import rate_of
from fedlora.privacy.streams import RandomSource
from fedlora.startup import paused_gc
from simulation.run import prepare

if TYPE_CHECKING:
    from fedlora.models.trainable import Trainable
    from fedlora.privacy.accounting import PrivacyPlan

TIMED_ROWS = 64
"""The most records of the timed step, and the most held-out rows of the timed evaluation. A step of
32 takes twice as long a record under DP as those of a run do."""

DROPPED = "of an institution left out or a class without one, or above data.max-records"


def describe(config: RunConfig) -> dict[str, Any]:
    """Describe a run before it starts.

    Args:
        config: The run, a simulation.

    Returns:
        ``rows``, ``classes``, ``institutions``, ``left_out``, ``ledgers``, ``privacy``, ``model``,
        ``cost``; ``findings``; and ``refused``, the reasons why `fedlora run` would refuse it.
        Values are ready for JSON.

    Raises:
        InputError: If the records cannot be read at all, or the run is a deployment's.
    """
    if config.deployed:
        raise InputError(
            "data.source is 'institutions', where nobody sees all records; each institution checks "
            "its own with `fedlora deploy check --institution SETTINGS.toml`"
        )
    records = prepare(config)
    with paused_gc():
        from server import aggregation, plugged, population, tracking
        from server.start import head_start, start_adapter
    refused: list[str] = []

    def attempt(inspect: Any, *arguments: Any) -> Any:
        try:
            return inspect(*arguments)
        except (InputError, Refusal) as error:
            refused.append(str(error))
            return None

    cap = config.federation.participations(len(records.names))
    attempt(population.check_settings, config, records)
    plans: list[PrivacyPlan] = []
    if config.privacy.enabled:
        plans = attempt(findings.plans_of, config, records.units, cap) or []
    found: list[Finding] = []
    if plans or not config.privacy.enabled:
        found = findings.findings(config, records, cap)
        attempt(findings.refuse, config, found)
    ledgers = _ledgers(config, records, plans)
    unusable = [ledger["problem"] for ledger in ledgers.values() if "problem" in ledger]
    lacking = sum(not ledger["fits"] for ledger in ledgers.values())
    strategy = attempt(plugged.strategy, config.federation)
    chosen = attempt(aggregation.choose, config, len(records.names), cap, strategy, None)
    least = chosen.least_asked if chosen else 1
    if lacking and len(records.names) - lacking < least:
        of = f"of {len(records.names)} institutions"
        if unusable:
            refused.append(
                f"{len(unusable)} {of} cannot use their ledgers, and a round needs {least}: "
                f"{unusable[0]}"
            )
        if exhausted := lacking - len(unusable):
            refused.append(
                f"budget exhausted: {exhausted} {of} have too little left in their ledgers, whose "
                f"limit nothing raises, and {least} institutions are needed"
            )
    started = time.monotonic()
    work = attempt(_load, config, records)
    loading = time.monotonic() - started
    attempt(tracking.check, config)
    head = ""
    if work is not None and (start := attempt(start_adapter, config, work)) is not None:
        head = head_start(config, work, start)
    return {
        "rows": _rows(config, records),
        "classes": _classes(records),
        "institutions": _institutions(records, plans),
        "left_out": dict(records.left_out),
        "ledgers": ledgers,
        "privacy": {
            "epsilon": config.privacy.epsilon,
            "unit": config.privacy.unit,
            "noise": config.privacy.noise,
            "participations": cap,
            **({"reach": findings.reach(config, plans, cap)} if plans else {}),
        },
        "model": {} if work is None else _model(config, work, head),
        "cost": {} if work is None else _cost(config, records, plans, work, loading),
        "findings": [vars(finding) for finding in found],
        "refused": list(dict.fromkeys(refused)),
    }


def _load(config: RunConfig, records: Federation) -> "Trainable":
    with paused_gc():
        from fedlora.models import trainable
    return trainable.load(config, records.labels)


def _rows(config: RunConfig, records: Federation) -> dict[str, Any]:
    counts = records.counts
    return {
        "read": counts["rows"] + counts["test_rows"],
        "train": counts["train"],
        "held_out": counts["held_out"],
        "dropped": {
            **findings.lost(counts),
            **({DROPPED: counts["rows_dropped"]} if counts["rows_dropped"] else {}),
        },
        "cut": counts["truncated"],
        "max_length": config.training.max_length,
    }


def _classes(records: Federation) -> dict[str, dict[str, int]]:
    if not records.labels:
        return {}
    held_out = np.bincount(records.all_held_out.targets, minlength=len(records.labels)).tolist()
    return {
        label: {"train": count, "held_out": held}
        for (label, count), held in zip(
            findings.class_records(records).items(), held_out, strict=True
        )
    }


def _institutions(records: Federation, plans: Sequence["PrivacyPlan"]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(records.names):
        shard = records.train(index)
        described[name] = {
            "train": len(shard),
            "units": shard.num_units,
            "size_class": accounting.public_size(shard.num_units),
            "held_out": len(records.held_out(index)),
        }
        if plans:
            plan = plans[index]
            described[name] |= {
                "delta": plan.delta,
                "noise_multiplier": plan.noise_multiplier,
                "expected_batch_size": plan.expected_batch_size,
            }
    return described


def _ledgers(
    config: RunConfig, records: Federation, plans: Sequence["PrivacyPlan"]
) -> dict[str, dict[str, Any]]:
    """Epsilon spent and left, limit, and whether the run fits, of ledgers that the run finds.

    Also of those that it could not make.
    """
    if not plans or not config.privacy.ledger:
        return {}
    from client.checks import check_ledger_delta
    from client.institution import Institution
    from client.ledger import Ledger

    described: dict[str, dict[str, Any]] = {}
    for index, (name, plan) in enumerate(zip(records.names, plans, strict=True)):
        institution = Institution.locate(config, index)
        shard = records.train(index)
        path, units = institution.ledger_path, shard.num_units
        if not path.exists():
            if path.parent.exists() and (exposed := files.exposed(path)):
                described[name] = {"fits": False, "problem": exposed}
            continue
        try:
            with Ledger.open(path) as ledger:
                check_ledger_delta(ledger, path, units)
                ledger.is_bound(shard.fingerprint, config.privacy.unit)
                shown = ledger.show()
                described[name] = {key: shown[key] for key in ("epsilon", "left", "limit", "delta")}
                described[name]["fits"] = ledger.fits(plan.events)
        except Refusal as refusal:
            described[name] = {"fits": False, "problem": refusal.detail}
    return described


def _model(config: RunConfig, work: "Trainable", head: str) -> dict[str, Any]:
    from fedlora.models import tasks
    from fedlora.models.adapters import PARTS

    adapter = sum(tensor.numel() for tensor in work.start.only(PARTS).values())
    trained = work.start.only(config.federation.traits.trained_parts)
    total = sum(p.numel() for p in work.model.parameters())
    stored = sum(p.numel() * p.element_size() for p in tasks.base_model(work.model).parameters())
    return {
        "name": config.model.name,
        "kind": work.base.kind,
        "parameters": total - adapter,
        "bytes": stored,
        "trained_parameters": sum(tensor.numel() for tensor in trained.values()),
        "adapter_bytes": 4 * adapter,  # sent as float32
        **({"head": head} if head else {}),
    }


def _cost(
    config: RunConfig,
    records: Federation,
    plans: Sequence["PrivacyPlan"],
    work: "Trainable",
    loading: float,
) -> dict[str, Any]:
    """Expected time and bytes, from one measured step and one measured evaluation."""
    from fedlora.wire import wire

    federation, names = config.federation, len(records.names)
    asked = min(federation.institutions_per_round or names, names)
    with processors.threads(config.engine.threads):
        of_row = _seconds_per_row(config, records, plans, work)
        measured_row = _evaluation_seconds_per_row(records, work)
    workers = config.engine.workers or max(1, processors.count() // config.engine.threads)
    shards = [records.train(i) for i in range(names)]
    each = [(len(shard), rate_of(config, shard)) for shard in shards]
    rows = sum(size * rate for size, rate in each) * asked / names
    steps = federation.rounds * config.training.local_steps
    seconds = {
        "loading": loading,
        "training": steps * rows * of_row / min(workers, asked),
        "evaluation": federation.evaluations * len(records.all_held_out) * measured_row,
        "home": 0.0,
    }
    if chosen := config.at_home(names):
        at_home = config.home.work_of_all([size for size, _ in each])
        seconds["home"] = at_home * of_row / min(workers, len(chosen))
    ordered = wire.array_bytes(wire.pack_adapter(work.start))
    answered = [
        8 * sum(tensor.numel() for tensor in parts.values())
        if config.privacy.shares_noise  # words of 8 bytes, which can be added up
        else wire.array_bytes(wire.pack_adapter(parts))
        for parts in (work.start.only(sent) for sent in federation.traits.sent)
    ]
    moved = federation.rounds * ordered + sum(
        answered[number % len(answered)] for number in range(federation.rounds)
    )
    return {
        "seconds_per_record": of_row,
        "workers": min(workers, names),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "minutes": sum(seconds.values()) / 60,
        "bytes_moved": moved * asked,
        "bytes_grow": federation.traits.residuals,  # whose rank may grow with the rounds
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _seconds_per_row(
    config: RunConfig, records: Federation, plans: Sequence["PrivacyPlan"], work: "Trainable"
) -> float:
    """Seconds of one record in a training step, from the second of two steps."""
    from client.training import LocalPlan, train

    rows = min(TIMED_ROWS, config.training.physical_batch, len(records.all_train))
    chosen = np.linspace(0, len(records.all_train) - 1, rows).astype(np.int64)  # of all lengths
    shard = replace(records.all_train.select(chosen), units=np.arange(rows))
    plan = replace(LocalPlan.of(config), steps=1)
    source = RandomSource.seeded("check", config.seed)
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        if plans:
            from client.private_training import Participant, train_privately

            mechanism = replace(plans[0], sample_rate=1.0, honest=0)
            member = Participant(shard=shard, mechanism=mechanism, source=source)
            train_privately(work, [member], plan)
        else:
            train(work, shard, plan, rows, source)
            work.start.load_into(work.model)
        seconds = time.monotonic() - started
    return seconds / rows


def _evaluation_seconds_per_row(records: Federation, work: "Trainable") -> float:
    held_out: Shard = records.all_held_out
    rows = min(TIMED_ROWS, len(held_out))
    if not rows:
        return 0.0
    shard = held_out.select(np.linspace(0, len(held_out) - 1, rows).astype(np.int64))
    started = time.monotonic()
    work.task.evaluate(work.model, shard, work.labels)
    return (time.monotonic() - started) / rows

"""`fedlora check`: everything about a run that is known before it starts, without spending any.

The records are read and the base model is loaded as a run does it. Then a few records take one
training step, and a few held-out rows are predicted, for the expected time; their results are
dropped.
"""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedlora import processors
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

_T = TypeVar("_T")
TIMED_ROWS = 64
"""The most records of the timed step, and the most held-out rows of the timed evaluation. A step of
32 takes twice as long a record under DP as those of a run do."""

DROPPED = "of an institution left out or a class without one, or above data.max-records"


@dataclass
class _Attempts:
    """Calls of which each may find a reason why `fedlora run` would refuse the run."""

    refused: list[str] = field(default_factory=list[str])

    def __call__(self, inspect: Callable[..., _T], *arguments: Any) -> _T | None:
        """The result of a call; None where it is refused."""
        try:
            return inspect(*arguments)
        except (InputError, Refusal) as error:
            self.refused.append(str(error))
            return None


def describe(config: RunConfig) -> dict[str, Any]:
    """Describe a run before it starts.

    Args:
        config: The run, a simulation.

    Returns:
        ``rows``, ``classes``, ``institutions``, ``left_out``, ``privacy``, ``model``, ``cost``;
        ``findings``; and ``refused``, the reasons why `fedlora run` would refuse it. Values are
        ready for JSON.

    Raises:
        InputError: If the records cannot be read at all, or the run is a deployment's.
    """
    records, attempt = prepare(config), _Attempts()
    cap = config.federation.participations(len(records.names))
    plans, found = _promise(config, records, cap, attempt)
    started = time.monotonic()
    work = attempt(_load, config, records)
    loading = time.monotonic() - started
    return {
        "rows": _rows(config, records),
        "classes": _classes(records),
        "institutions": _institutions(records, plans),
        "left_out": dict(records.left_out),
        "privacy": {
            "epsilon": config.privacy.epsilon,
            "unit": config.privacy.unit,
            "noise": config.privacy.noise,
            "participations": cap,
            **({"reach": findings.reach(config, plans, cap)} if plans else {}),
        },
        "model": {} if work is None else _model(config, work, _head(config, work, attempt)),
        "cost": {} if work is None else _cost(config, records, plans, work, loading),
        "findings": [vars(finding) for finding in found],
        "refused": list(dict.fromkeys(attempt.refused)),
    }


def _promise(
    config: RunConfig, records: Federation, cap: int, attempt: _Attempts
) -> tuple[Sequence["PrivacyPlan"], Sequence[Finding]]:
    """Each institution's plan, and findings; what a server checks before its first round."""
    with paused_gc():
        from server import institution_privacy, plugged, population
    attempt(population.check_settings, config, records)
    attempt(plugged.strategy, config.federation)
    attempt(plugged.callbacks, config)
    if config.privacy.hides_institutions:
        attempt(institution_privacy.plan, config, len(records.names), cap)
    plans: Sequence[PrivacyPlan] = ()
    if config.privacy.enabled:
        plans = attempt(findings.plans_of, config, records.units, cap) or ()
        if not plans:
            return (), ()
    found = findings.findings(config, records, cap)
    attempt(findings.refuse, config, found)
    return plans, found


def _head(config: RunConfig, work: "Trainable", attempt: _Attempts) -> str:
    with paused_gc():
        from server.start import head_start, start_adapter
    start = attempt(start_adapter, config, work)
    return "" if start is None else head_start(config, work, start)


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
    workers = max(1, processors.count() // config.engine.threads)
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

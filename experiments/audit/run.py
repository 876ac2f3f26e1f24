"""`fedlora audit`: a run with canaries, and what attackers make of it."""

import dataclasses
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from experiments.audit import membership
from experiments.audit.bound import audit as bound
from experiments.audit.bound import most
from experiments.audit.canaries import (
    INSTITUTION,
    LABEL,
    TEXT,
    Audited,
    alternatives,
    plant,
    write,
)
from experiments.audit.observed import Transcript, likeness, losses, scores
from fedlora import data, records, trainable
from fedlora.adapters import AdapterState
from fedlora.config import KEPT, RESIDUALS, RunConfig
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.rows import partition_rows
from fedlora.run_files import finite
from fedlora.shards import Shard
from fedlora.streams import RandomSource
from fedlora.terminal import Terminal
from fedlora.trainable import Trainable
from simulation.progress import progress
from simulation.run import load, open_engine, run_rounds

CONFIDENCE = 0.95
VIEWS = ("the final adapter", "every round, as the server sees it")
EACH_VIEW = 1 - (1 - CONFIDENCE) / len(VIEWS)
"""Confidence of each view's bound, so that both together have ``CONFIDENCE``."""
ALIKE = 0.5  # updates with a larger cosine have noise in common; see `likeness`
CANDIDATES = 255  # other secrets that a planted one is ranked among: exposure is at most 8 bits

Floats = NDArray[np.float64]


def check(config: RunConfig, out: Path) -> None:
    """Refuse what cannot be audited.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    if (out / "audit.json").exists() or (out / "run" / "config.toml").exists():
        raise InputError(f"{out} holds another audit; give another --out")
    if config.federation.strategy in KEPT or config.adapter.ranks:
        raise InputError(
            f"federation.strategy is {config.federation.strategy!r} and adapter.ranks "
            f"{config.adapter.ranks!r}, but the audit reads what all institutions get and send; "
            "use another strategy and one rank"
        )
    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is a deployment's; an audit plants its own rows, "
            "so name records"
        )


def run(
    config: RunConfig,
    *,
    out: Path,
    canaries: int,
    shadows: int,
    engine: str,
    console: Terminal,
) -> dict[str, Any]:
    """Plant canaries, run, attack.

    Args:
        config: What to audit.
        out: The audit's directory; the run's is ``run`` in it.
        canaries: In all.
        shadows: Further runs for LiRA; 0 leaves it out.
        engine: ``ray`` or ``inline``.
        console: Says what is being done.

    Returns:
        What ``audit.json`` holds; ``lira failed`` says why shadows did not end, if they did not.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as folder:
        audited = plant(config, canaries, Path(folder) / "records")
        out.mkdir(parents=True, exist_ok=True)
        run_dir = str((out / "run").absolute())
        # Ledgers of its own: the user's are bound to records without canaries.
        target = audited.config.replace({"run-dir": run_dir, "privacy.ledger": ""})
        transcript = Transcript(folder=Path(folder) / "transcript")
        _train(target, engine, console, transcript)
        # From here on nothing is trained but for shadows: read what was released.
        work = _opened(target)
        with console.status("scoring canaries") as status:
            final, seen, shard = _scored(target, work, transcript, audited, status.update)
        trained = _distinct(records.load(target).all_train)
        for canary, row in zip(audited.canaries, _digests(shard), strict=True):
            assert not canary.inside or bytes(row) in trained, f"{canary} was not trained on"
        result = _promise(Path(target.run_dir))
        inside = np.array([canary.inside for canary in audited.canaries])
        delta = result["delta"] or 0.0
        result["canaries"] = {
            "planted": int(inside.sum()),
            "in all": len(inside),
            "most they can show": most(len(inside), delta, EACH_VIEW),
            "kinds": dict(Counter(canary.kind for canary in audited.canaries)),
        } | {
            view: dataclasses.asdict(bound(found, inside, delta=delta, confidence=EACH_VIEW))
            for view, found in zip(VIEWS, (final, seen), strict=True)
        }
        result["noise"] = {"source": config.privacy.noise, "bound": ALIKE}
        if config.privacy.enabled:
            result["noise"] |= dataclasses.asdict(likeness(target, transcript))
        if config.model.task == "sft":
            with console.status("ranking secrets"):
                result["extraction"] = _extraction(target, work, audited, Path(folder), inside)
        with console.status("attacking real rows"):
            rows = _attacked(target, set(_distinct(shard)))
            loss = membership.measure(-rows.losses, rows.inside, CONFIDENCE)
            result["membership"] = {"loss": loss}
        shutil.rmtree(Path(folder) / "transcript")
        result["refuted"] = (result["noise"].get("cosine") or 0.0) > ALIKE or any(
            result["canaries"][view]["epsilon"] > result["epsilon"] for view in VIEWS
        )
        result = _keep(out, result)
        if shadows:
            kept = f"kept so far: {out / 'audit.json'}; {shadows} shadow runs for LiRA follow"
            console.write_line(kept)
            try:
                lira = _lira(target, rows, engine, shadows, Path(folder), console)
                result["membership"]["lira"] = lira
            except Exception as error:
                result["lira failed"] = f"{type(error).__name__}: {error}"
            result = _keep(out, result)
    return result


def _keep(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result; gives it as the file holds it."""
    result = finite(result)
    write_atomic(out / "audit.json", json.dumps(result, indent=2).encode())
    return result


def _train(
    config: RunConfig,
    engine: str,
    console: Terminal,
    transcript: Transcript | None = None,
) -> None:
    with (
        load(engine, config) as loaded,
        open_engine(engine, config, loaded) as grid,
    ):
        if transcript is not None:
            transcript.watch(grid)
        with progress(config, grid, console):
            run_rounds(config, grid)


def _opened(config: RunConfig) -> Trainable:
    """The base with the adapter that a run released."""
    work = trainable.load(config, records.load(config).labels)
    adapter = AdapterState.open(Path(config.run_dir) / "adapter")
    if config.federation.strategy in RESIDUALS:
        adapter = adapter.as_residual(work.start)
    adapter.load_into(work.model)
    return work


def _scored(
    config: RunConfig,
    work: Trainable,
    transcript: Transcript,
    audited: Audited,
    say: Callable[[str], None],
) -> tuple[Floats, Floats, Shard]:
    """Scores of canaries by the final adapter, by all rounds, and the canaries' rows."""
    shard = _rows(config, work, audited.file)
    physical = config.training.physical_batch
    final = losses(work, shard, physical)
    work.start.load_into(work.model)
    gained = losses(work, shard, physical) - final
    owners = [canary.institution for canary in audited.canaries]
    seen = scores(config, work, transcript, shard, owners, say)
    return gained, seen, shard


def _rows(config: RunConfig, work: Trainable, file: Path) -> Shard:
    return data.load_shard(
        str(file),
        text=config.data.text,
        label=config.data.label,
        labels=work.labels,
        encode=work.task.encode,
    )[0]


def _promise(run_dir: Path) -> dict[str, Any]:
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    privacy = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    return {
        "epsilon": float(result["epsilon_max"]),
        "delta": result["delta"],
        "protects": privacy["protects"],
        "accuracy": result.get("accuracy"),
        "run_dir": str(run_dir),
    }


def _digests(shard: Shard) -> NDArray[np.uint8]:
    assert shard.records is not None, "rows of a source have digests"
    return shard.records


def _distinct(shard: Shard) -> dict[bytes, int]:
    """Digest -> a row that has it: what stands at several institutions says the same once."""
    return {bytes(digest): row for row, digest in enumerate(_digests(shard))}


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Real rows under attack: digests, losses ``(n,)``, and which were trained on ``(n,)``."""

    digests: list[bytes]
    losses: Floats
    inside: NDArray[np.bool_]


def _attacked(config: RunConfig, planted: set[bytes]) -> _Rows:
    """The rows that are no canaries, under the final adapter: trained on, then held out."""
    federation, work = records.load(config), _opened(config)
    digests, found, inside = list[bytes](), list[Floats](), list[bool]()
    for shard, trained in ((federation.all_train, True), (federation.all_held_out, False)):
        known = {digest: row for digest, row in _distinct(shard).items() if digest not in planted}
        digests += known
        rows = shard.select(list(known.values()))
        found.append(losses(work, rows, config.training.physical_batch))
        inside += [trained] * len(known)
    return _Rows(digests=digests, losses=np.concatenate(found), inside=np.array(inside))


def _lira(
    config: RunConfig,
    rows: _Rows,
    engine: str,
    shadows: int,
    folder: Path,
    console: Terminal,
) -> dict[str, Any]:
    """The same rows under LiRA, which trains shadows."""
    confidences, had = list[Floats](), list[NDArray[np.bool_]]()
    for number in range(shadows):
        shadow = _shadow(config, number, folder)
        _train(shadow, engine, console)
        work = _opened(shadow)
        inside = _distinct(records.load(shadow).all_train)
        had.append(np.array([row in inside for row in rows.digests]))
        confidences.append(_by_digest(shadow, work, rows.digests))
    attack = membership.lira(
        membership.logit_confidence(rows.losses), np.array(confidences), np.array(had)
    )
    return membership.measure(attack, rows.inside, CONFIDENCE) | {"shadows": shadows}


def _shadow(config: RunConfig, number: int, folder: Path) -> RunConfig:
    """A run like this one whose rows are split at random anew, half of them held out."""
    place = folder / f"shadow-{number}"
    place.mkdir()
    everything = dataclasses.replace(config.data, institutions=0, min_records=1, test_fraction=0.0)
    dealt = partition_rows(everything, unit="record", seed=config.seed, task=config.model.task)
    rows: list[tuple[str, str, str]] = []
    for table, bounds in (dealt.train, dealt.held_out):
        owners = np.repeat(np.array(dealt.names), np.diff(bounds)).tolist()
        rows += zip(owners, table.texts, table.labels, strict=True)
    write(place / "all.csv", [INSTITUTION, TEXT, LABEL], rows)
    return config.replace(
        {
            "run-dir": str(place / "run"),
            "data.source": str(place / "all.csv"),
            "data.test-source": "",
            "data.test-fraction": 0.5,
            "privacy.unit": "record",
            "privacy.delta": config.privacy.delta if config.privacy.unit == "record" else 0.0,
            "seed": config.seed + 1 + number,
        }
    )


def _by_digest(config: RunConfig, work: Trainable, digests: list[bytes]) -> Floats:
    """Confidence in each of these rows under the adapter that is loaded."""
    federation = records.load(config)
    known: dict[bytes, float] = {}
    for shard in (federation.all_train, federation.all_held_out):
        distinct = _distinct(shard)
        rows = shard.select(list(distinct.values()))
        values = losses(work, rows, config.training.physical_batch)
        known |= zip(distinct, values.tolist(), strict=True)
    return membership.logit_confidence(np.array([known[digest] for digest in digests]))


def _extraction(
    config: RunConfig, work: Trainable, audited: Audited, folder: Path, inside: NDArray[np.bool_]
) -> dict[str, Any]:
    """Exposure of secrets that were planted, beside those that were not."""
    _opened(config)
    others = alternatives(audited.canaries, CANDIDATES, config.seed)
    write(folder / "others.csv", [TEXT, LABEL], [(c.text, c.label) for c in others])
    physical = config.training.physical_batch
    own = losses(work, _rows(config, work, audited.file), physical)
    rest = losses(work, _rows(config, work, folder / "others.csv"), physical)
    bits = membership.exposure(own, rest.reshape(len(own), CANDIDATES))
    draw = RandomSource.seeded("exposure", config.seed)
    return {
        "planted": _summary(bits[inside], draw.child("in")),
        "not planted": _summary(bits[~inside], draw.child("out")),
        "most possible": float(np.log2(CANDIDATES + 1)),
    }


def _summary(bits: Floats, draw: RandomSource) -> dict[str, float]:
    """Mean with a bootstrap interval, and the largest."""
    n = len(bits)
    again = bits[(draw.uniform(1000 * n) * n).astype(int)].reshape(1000, n).mean(1)
    low, high = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "mean": float(bits.mean()),
        "low": float(low),
        "high": float(high),
        "max": float(bits.max()),
        "secrets": n,
    }


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an audit found, in words: what -> found. The last is its verdict."""
    promised, canaries = float(result["epsilon"]), result["canaries"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in canaries["kinds"].items())
    found = [
        (
            "promised",
            f"epsilon {promised:.3f} at delta {result['delta']:g}"
            if math.isfinite(promised)
            else "nothing (epsilon inf)",
        ),
        ("canaries", f"{canaries['planted']:,} of {canaries['in all']:,} planted ({kinds})"),
    ]
    for view in VIEWS:
        bound = canaries[view]
        text = (
            f"epsilon at least {bound['epsilon']:.2f} ({100 * bound['confidence']:g} % "
            f"confidence), from {view}: {bound['right']} of {bound['guesses']} guesses right"
        )
        found.append(("shown by canaries", text))
    if math.isfinite(promised):
        found.append(("noise", _noise(result["noise"])))
    for attack, measured in result["membership"].items():
        found.append((f"who was trained on ({attack})", _attack(measured)))
    if failed := result.get("lira failed"):
        found.append(("who was trained on (lira)", f"not known: its runs failed ({failed})"))
    if extraction := result.get("extraction"):
        for which in ("planted", "not planted"):
            bits = extraction[which]
            text = (
                f"exposure {bits['mean']:.2f} bits ({bits['low']:.2f} to {bits['high']:.2f}), "
                f"at most {bits['max']:.1f} of {extraction['most possible']:.0f}"
            )
            found.append((f"secrets {which}", text))
    if result["accuracy"] is not None:
        found.append(("accuracy of the audited run", f"{result['accuracy']:.3f}"))
    return [*found, ("the promise", verdict(result))]


def show(result: Mapping[str, Any], console: Terminal) -> None:
    """The audit as a table."""
    table = Table(title="Privacy audit", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    *found, last = facts(result)
    for row in found:
        table.add_row(*row)
    table.add_row(*last, style="bold red" if result["refuted"] else "")
    console.print(table)


def verdict(result: Mapping[str, Any]) -> str:
    """What an audit says of the promise, in words."""
    promised, canaries = float(result["epsilon"]), result["canaries"]
    if result["refuted"]:
        return "IS BROKEN"
    if not math.isfinite(promised):
        return "nothing was promised"
    can = f"{canaries['in all']:,} canaries show epsilon {canaries['most they can show']:.2f}"
    if canaries["most they can show"] <= promised:
        return f"is not refuted; {can} at most, so they could not have refuted it: see --canaries"
    return f"is not refuted; {can} at most"


def _noise(noise: Mapping[str, Any]) -> str:
    """Whether noise was used twice, in words."""
    if noise["cosine"] is None:
        text = "not compared: no two updates were sent, or records could move them as far as noise"
    else:
        said = "drawn anew each time" if noise["cosine"] <= noise["bound"] else "USED TWICE"
        text = f"{said} (largest cosine of two updates {noise['cosine']:.3f})"
        if noise["left_out"]:
            both = noise["institutions"] + noise["left_out"]
            text += f"; compared at {noise['institutions']} of {both} institutions"
    return text + "; from a seed, so it protects nobody" * (noise["source"] == "seeded")


def _attack(measured: Mapping[str, Any]) -> str:
    """How well an attack tells members, in words."""

    def interval(value: Mapping[str, float], digits: int, scale: int = 1) -> str:
        middle, low, high = (f"{scale * value[k]:.{digits}f}" for k in ("value", "low", "high"))
        return f"{middle} ({low} to {high})"

    parts = [f"AUC {interval(measured['auc'], 3)}"]
    parts += [
        f"finds {interval(value, 1, 100)} % of members at {100 * float(rate):g} % false alarms"
        for rate, value in measured["tpr"].items()
    ]
    texts = f"{measured['members']:,} rows against {measured['others']:,} held out"
    return "; ".join(parts) + f"; {texts}, none twice"

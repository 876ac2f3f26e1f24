"""`fedlora audit`: a run with canaries, and attacks on it."""

import contextlib
import dataclasses
import json
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

from experiments.audit import bound, membership
from experiments.audit.canaries import (
    ALTERNATIVE_SECRETS,
    INSTITUTION,
    LABEL,
    TEXT,
    Audited,
    alternatives,
    plant,
    write,
)
from experiments.audit.findings import FILE, FINAL, broken_by, facts
from experiments.audit.observed import (
    Transcript,
    losses,
    noise_reuse,
    scores,
)
from fedlora.arrays import Floats
from fedlora.config.config import ACCEPTABLE, RunConfig
from fedlora.data import data, records
from fedlora.data.rows import partition_rows
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.files import write_atomic
from fedlora.models import trainable
from fedlora.models.adapters import open_for
from fedlora.models.trainable import Trainable
from fedlora.privacy.streams import RandomSource
from fedlora.runs.run_files import AUDITED, CONFIG, PRIVACY, finite, read_run_file
from fedlora.terminal import Terminal
from simulation.progress import progress
from simulation.run import check_engine, load, open_engine, run_rounds

CONFIDENCE = 0.95
MIN_CANARIES = 10
MAX_COSINE = 0.5  # updates with a larger cosine share noise; see `noise_reuse`


def check(config: RunConfig, out: Path, canaries: int, engine: str) -> None:
    """Refuse a run that cannot be audited.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    check_engine(engine)
    if canaries < MIN_CANARIES:
        raise InputError(
            f"--canaries is {canaries}; it must be at least {MIN_CANARIES}, and so few show next "
            "to nothing"
        )
    if config.data.view != "all":
        raise InputError(
            f"data.view is {config.data.view!r}, but the audit plants rows at each institution; "
            "use all"
        )
    if (out / FILE).exists() or (out / "run" / CONFIG).exists():
        raise InputError(f"{out} holds another audit; give another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds other files; give an --out that is empty or does not exist")
    if config.privacy.hides_institutions and not config.privacy.enabled:
        raise InputError(
            "privacy.epsilon is inf, so that records are promised nothing that an audit could "
            "test; privacy.institution-epsilon promises to hide institutions, which it does not "
            "test: set privacy.epsilon, or leave out privacy.institution-epsilon"
        )
    if config.federation.traits.local_parts:
        raise InputError(
            f"federation.strategy is {config.federation.strategy!r}, but the audit needs "
            "adapters that all institutions receive and send; use another strategy"
        )
    if config.privacy.masks:
        raise InputError(
            f"privacy.protocol is {config.privacy.protocol!r}, but the audit attacks sums of "
            "vectors, and masks hide the vectors that it adds up; use ideal, which has the same "
            "sums"
        )
    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is for deployments; an audit plants its own "
            "rows, so name records"
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
        config: The run to audit.
        out: The audit's directory; the run directory is ``run`` in it.
        canaries: The number of canaries, planted or not.
        shadows: Further runs for LiRA; 0 leaves it out.
        engine: ``ray`` or ``inline``.
        console: Shows progress.

    Returns:
        The content of ``audit.json``; ``lira failed`` gives the reason if a shadow run failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as folder:
        audited = plant(config, canaries, Path(folder) / "records")
        out.mkdir(parents=True, exist_ok=True)
        run_dir = str((out / "run").absolute())
        # The run gets its own ledgers: the user's are bound to records without canaries.
        target = audited.config.replace(
            {"run-dir": run_dir, "privacy.ledger": "", "home.method": "none"}
        )
        transcript = Transcript(folder=Path(folder) / "transcript")
        mark = out / "run" / AUDITED  # no run may take this one for one on other records
        write_atomic(mark, f"{json.dumps({'source': config.data.source})}\n".encode())
        try:
            _train(target, engine, console, transcript)
        except (InputError, Refusal):
            with contextlib.suppress(OSError):
                if not (mark.parent / CONFIG).exists():  # refused before the first round
                    shutil.rmtree(mark.parent)
                    out.rmdir()
            raise
        # The audited run is complete; the attacks below read its released adapters.
        work = _load_released(target)
        with console.status("scoring canaries") as status:
            scored, shard = _scored(target, work, transcript, audited, status.update)
        _check_planted(target, audited, shard)
        inside = np.array([canary.inside for canary in audited.canaries])
        result = _promise(Path(target.run_dir))
        result["canaries"] = _bounds(audited, scored, result["delta"] or 0.0)  # None: no DP
        result["noise"] = {"source": config.privacy.noise, "bound": MAX_COSINE}
        if config.privacy.enabled:
            result["noise"] |= dataclasses.asdict(noise_reuse(target, transcript))
        if config.model.task == "sft":
            with console.status("ranking secrets"):
                result["extraction"] = _extraction(target, audited, Path(folder), inside)
        with console.status("attacking real rows"):
            rows = _attacked(target, set(_distinct(shard)))
            loss = membership.measure(-rows.losses, rows.inside, CONFIDENCE)
            result["membership"] = {"loss": loss}
        shutil.rmtree(Path(folder) / "transcript")
        result["refuted"] = broken_by(result) != ""
        result = _write_result(out, result)
        if shadows:
            kept = f"kept so far: {out / FILE}; {shadows} shadow runs for LiRA follow"
            console.write_line(kept)
            try:
                lira = _lira(target, rows, engine, shadows, Path(folder), console)
                result["membership"]["lira"] = lira
            except Exception as error:
                result["lira failed"] = f"{type(error).__name__}: {error}"
            result = _write_result(out, result)
    return result


def _check_planted(config: RunConfig, audited: Audited, shard: Shard) -> None:
    """Check that the run trained on every planted canary."""
    trained = _distinct(records.load(config).all_train)
    for canary, row in zip(audited.canaries, shard.records, strict=True):
        assert not canary.inside or bytes(row) in trained, f"{canary} was not trained on"


def _bounds(audited: Audited, scored: Mapping[str, Floats], delta: float) -> dict[str, Any]:
    """Bound epsilon from below by the canaries' scores ``(m,)`` in each view.

    All bounds together hold with ``CONFIDENCE``. A view leaves out canaries with the score nan.
    """
    inside = np.array([canary.inside for canary in audited.canaries])
    confidence = 1 - (1 - CONFIDENCE) / len(scored)
    found: dict[str, Any] = {
        "planted": int(inside.sum()),
        "in all": len(inside),
        "most they can show": bound.largest(len(inside), delta, confidence),
        "kinds": dict(Counter(canary.kind for canary in audited.canaries)),
    }
    for view, values in scored.items():
        known = ~np.isnan(values)
        shown = bound.audit(values[known], inside[known], delta=delta, confidence=confidence)
        found[view] = dataclasses.asdict(shown)
    return found


def _write_result(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write audit.json; return the result as the file holds it."""
    result = finite(result)
    write_atomic(out / FILE, json.dumps(result, indent=2).encode())
    return result


def _train(
    config: RunConfig,
    engine: str,
    console: Terminal,
    transcript: Transcript | None = None,
) -> None:
    with (
        load(engine, config),
        open_engine(engine, config) as grid,
    ):
        if transcript is not None:
            transcript.watch(grid)
        with progress(config, grid, console):
            run_rounds(config, grid)


def _load_released(config: RunConfig) -> Trainable:
    """Load the base model with the adapter that a run released."""
    work = trainable.load(config, records.load(config).labels)
    place = Path(config.run_dir) / "adapter"
    adapter = open_for(place, work.start, residuals=config.federation.traits.residuals)
    adapter.load_into(work.model)
    return work


def _scored(
    config: RunConfig,
    work: Trainable,
    transcript: Transcript,
    audited: Audited,
    say: Callable[[str], None],
) -> tuple[dict[str, Floats], Shard]:
    """Return the canaries' scores ``(m,)`` in each view, and their rows."""
    shard = _rows(config, work, audited.file)
    physical = config.training.physical_batch
    final = losses(work, shard, physical)
    work.start.load_into(work.model)
    gained = losses(work, shard, physical) - final
    owners = [canary.institution for canary in audited.canaries]
    seen = scores(config, work, transcript, shard, owners, say)
    return {FINAL: gained, **seen}, shard


def _rows(config: RunConfig, work: Trainable, file: Path) -> Shard:
    shard, _ = data.load_shard(config.data, str(file), labels=work.labels, encode=work.task.encode)
    return shard


def _promise(run_dir: Path) -> dict[str, Any]:
    result, privacy = read_run_file(run_dir), read_run_file(run_dir, PRIVACY)
    return {
        "epsilon": float(result["epsilon_max"]),
        **({"epsilon_alone": alone} if (alone := result.get("epsilon_alone_max")) else {}),
        "delta": result["delta"],
        "protects": privacy["protects"],
        "accuracy": result.get("accuracy"),
        "run_dir": str(run_dir),
    }


def _distinct(shard: Shard) -> dict[bytes, int]:
    """Return digest -> one row with it, so that equal rows of several institutions count once."""
    return {bytes(digest): row for row, digest in enumerate(shard.records)}


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Real rows under attack: digests, losses ``(n,)`` and membership ``(n,)``."""

    digests: list[bytes]
    losses: Floats
    inside: NDArray[np.bool_]


def _attacked(config: RunConfig, planted: set[bytes]) -> _Rows:
    """Measure all rows except canaries under the final adapter: training rows, then held-out."""
    federation, work = records.load(config), _load_released(config)
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
    """Attack the same rows by LiRA, which trains shadow models."""
    confidences, had = list[Floats](), list[NDArray[np.bool_]]()
    for number in range(shadows):
        shadow = _shadow(config, number, folder)
        _train(shadow, engine, console)
        work = _load_released(shadow)
        inside = _distinct(records.load(shadow).all_train)
        had.append(np.array([row in inside for row in rows.digests]))
        confidences.append(_by_digest(shadow, work, rows.digests))
    attack = membership.lira(
        membership.logit_confidence(rows.losses), np.array(confidences), np.array(had)
    )
    return membership.measure(attack, rows.inside, CONFIDENCE) | {"shadows": shadows}


def _shadow(config: RunConfig, number: int, folder: Path) -> RunConfig:
    """Return a run on a new random split of all rows, with half of them held out."""
    place = folder / f"shadow-{number}"
    place.mkdir()
    everything = dataclasses.replace(config.data, institutions=0, min_records=1, test_fraction=0.0)
    dealt = partition_rows(everything, unit="record", seed=config.seed, task=config.model.task)
    rows: list[tuple[str, str, str]] = []
    for table, bounds in (dealt.train, dealt.held_out):
        owners = np.repeat(np.array(dealt.names), np.diff(bounds)).tolist()
        rows += zip(owners, table.texts, table.labels, strict=True)
    write(place / "all.csv", [INSTITUTION, TEXT, LABEL], rows)
    keeps_delta = config.privacy.unit == "record" or config.privacy.shares_noise
    return config.replace(
        {
            "run-dir": str(place / "run"),
            "data.source": str(place / "all.csv"),
            "data.test-source": "",
            "accept": ",".join(ACCEPTABLE),  # an attack's run promises nothing
            "data.test-fraction": 0.5,
            "privacy.unit": "record",
            "privacy.delta": config.privacy.delta if keeps_delta else 0.0,
            "seed": config.seed + 1 + number,
        }
    )


def _by_digest(config: RunConfig, work: Trainable, digests: list[bytes]) -> Floats:
    """Compute the confidence in each of these rows under the loaded adapter.

    It is nan for the rows of an institution that takes no part, because all are held out.
    """
    federation = records.load(config)
    known: dict[bytes, float] = {}
    for shard in (federation.all_train, federation.all_held_out):
        distinct = _distinct(shard)
        rows = shard.select(list(distinct.values()))
        values = losses(work, rows, config.training.physical_batch)
        known |= zip(distinct, values.tolist(), strict=True)
    return membership.logit_confidence(np.array([known.get(digest, np.nan) for digest in digests]))


def _extraction(
    config: RunConfig, audited: Audited, folder: Path, inside: NDArray[np.bool_]
) -> dict[str, Any]:
    """Measure the exposure of planted secrets and of secrets that were not planted."""
    work = _load_released(config)
    others = alternatives(audited.canaries, config.seed)
    write(folder / "others.csv", [TEXT, LABEL], [(c.text, c.label) for c in others])
    physical = config.training.physical_batch
    own = losses(work, _rows(config, work, audited.file), physical)
    rest = losses(work, _rows(config, work, folder / "others.csv"), physical)
    bits = membership.exposure(own, rest.reshape(len(own), ALTERNATIVE_SECRETS))
    draw = RandomSource.seeded("exposure", config.seed)
    return {
        **{  # of few canaries, coins may leave one group empty
            which: _summary(bits[chosen], draw.child(name))
            for which, name, chosen in (("planted", "in", inside), ("not planted", "out", ~inside))
            if chosen.any()
        },
        "most possible": float(np.log2(ALTERNATIVE_SECRETS + 1)),
    }


def _summary(bits: Floats, draw: RandomSource) -> dict[str, float]:
    """Return mean, its bootstrap interval, and maximum."""
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


def show(result: Mapping[str, Any], console: Terminal) -> None:
    """Print an audit as a table."""
    table = Table(title="Privacy audit", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    *found, last = facts(result)
    for row in found:
        table.add_row(*row)
    table.add_row(*last, style="bold red" if result["refuted"] else "")
    console.print(table)

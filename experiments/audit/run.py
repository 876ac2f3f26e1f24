"""`fedlora audit`: a run with canaries, and attacks on it."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments.audit import bound
from experiments.audit.canaries import Audited, plant
from experiments.audit.findings import FILE, FINAL, broken_by, facts
from experiments.audit.observed import (
    Transcript,
    losses,
    noise_reuse,
    scores,
)
from fedlora.arrays import Floats
from fedlora.config.config import RunConfig
from fedlora.data import data, records
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.files import write_atomic
from fedlora.models import trainable
from fedlora.models.adapters import open_for
from fedlora.models.trainable import Trainable
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
    engine: str,
    console: Terminal,
) -> dict[str, Any]:
    """Plant canaries, run, attack.

    Args:
        config: The run to audit.
        out: The audit's directory; the run directory is ``run`` in it.
        canaries: The number of canaries, planted or not.
        engine: ``ray`` or ``inline``.
        console: Shows progress.

    Returns:
        The content of ``audit.json``.
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
        result = _promise(Path(target.run_dir))
        result["canaries"] = _bounds(audited, scored, result["delta"] or 0.0)  # None: no DP
        result["noise"] = {"source": config.privacy.noise, "bound": MAX_COSINE}
        if config.privacy.enabled:
            result["noise"] |= dataclasses.asdict(noise_reuse(target, transcript))
        shutil.rmtree(Path(folder) / "transcript")
        result["refuted"] = broken_by(result) != ""
        return _write_result(out, result)


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

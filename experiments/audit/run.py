"""`fedlora audit`: a run with canaries, and an attack on them."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments.audit import bound
from experiments.audit.attack import Transcript, scores
from experiments.audit.canaries import Audited, plant
from experiments.audit.findings import FILE, facts
from fedlora.config.config import RunConfig
from fedlora.data import data, records
from fedlora.errors import InputError, Refusal
from fedlora.files import write_atomic
from fedlora.models import trainable
from fedlora.runs.run_files import AUDITED, CONFIG, PRIVACY, finite, read_run_file
from fedlora.terminal import Terminal
from simulation.progress import progress
from simulation.run import check_engine, load, open_engine, run_rounds

CONFIDENCE = 0.95
MIN_CANARIES = 10


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
    if config.privacy.shares_noise:
        raise InputError(
            f"privacy.trust is {config.privacy.trust!r}, but the audit attacks single updates, "
            "which masks hide; use local"
        )
    if config.deployed:
        raise InputError(
            "data.source is 'institutions', which is for deployments; an audit plants its own "
            "rows, so name records"
        )


def run(
    config: RunConfig, *, out: Path, canaries: int, engine: str, console: Terminal
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
        run_dir = (out / "run").absolute()
        target = audited.config.replace({"run-dir": str(run_dir), "home.method": "none"})
        transcript = Transcript(folder=Path(folder) / "transcript")
        out.mkdir(parents=True, exist_ok=True)
        # no run may take this one for one on other records
        mark = json.dumps({"source": config.data.source})
        write_atomic(run_dir / AUDITED, f"{mark}\n".encode())
        try:
            with load(engine, target), open_engine(engine, target) as grid:
                transcript.watch(grid)
                with progress(target, grid, console):
                    run_rounds(target, grid)
        except (InputError, Refusal):
            with contextlib.suppress(OSError):
                if not (run_dir / CONFIG).exists():  # refused before the first round
                    shutil.rmtree(run_dir)
                    out.rmdir()
            raise
        with console.status("scoring canaries") as status:
            result = _attacked(target, audited, transcript, status.update)
    write_atomic(out / FILE, json.dumps(finite(result), indent=2).encode())
    return finite(result)


def _attacked(
    config: RunConfig, audited: Audited, transcript: Transcript, say: Any
) -> dict[str, Any]:
    """The promise of a complete run, and what the attack shows."""
    work = trainable.load(config, records.load(config).labels)
    shard, _ = data.load_shard(
        config.data, str(audited.file), labels=work.labels, encode=work.task.encode
    )
    trained = {bytes(digest) for digest in records.load(config).all_train.records}
    inside = np.array([canary.inside for canary in audited.canaries])
    for planted, row in zip(inside, shard.records, strict=True):
        assert not planted or bytes(row) in trained, "the run did not train on a canary"
    owners = [canary.institution for canary in audited.canaries]
    found = scores(config, work, transcript, shard, owners, say)
    result = read_run_file(Path(config.run_dir))
    epsilon, delta = float(result["epsilon_max"]), result["delta"] or 0.0  # None: no DP
    shown = bound.audit(found, inside, delta=delta, confidence=CONFIDENCE)
    return {
        "epsilon": epsilon,
        "delta": result["delta"],
        "noise": config.privacy.noise,
        "protects": read_run_file(Path(config.run_dir), PRIVACY)["protects"],
        "accuracy": result.get("accuracy"),
        "run_dir": config.run_dir,
        "planted": int(inside.sum()),
        "shown": dataclasses.asdict(shown),
        "most_they_can_show": bound.largest(len(inside), delta, CONFIDENCE),
        "refuted": shown.epsilon > epsilon,
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

"""The adapter that a run starts from: a fresh one, or one of an earlier run or a directory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora import sources, tables
from fedlora.adapters import AdapterState, open_for, residual_names, saved_scale
from fedlora.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.files import sha256
from fedlora.lora_layers import Scale
from fedlora.model_card import LABELS
from fedlora.run_files import CONFIG, ENVIRONMENT, read_run_file
from fedlora.trainable import Trainable
from strategies.lowrank import carried, recompressed


def start_adapter(config: RunConfig, work: Trainable) -> AdapterState:
    """Read the adapter of ``adapter.start``: a run directory, or the directory of an adapter.

    A head for other classes is left out: the head then starts fresh.

    Args:
        config: The run.
        work: Its model, with the fresh adapter.

    Returns:
        The adapter, with every tensor of the fresh one; the fresh one where nothing is set. Under a
        strategy with residuals the earlier adapter, of any rank and scale, is the residual: such a
        strategy may start each round from factors of its own. Above ``federation.residual-rank`` it
        is cut back to the nearest one of that rank.

    Raises:
        InputError: If the directory holds no adapter, or one of another base, rank or scale; if it
            is a run that was not completed or has no adapter for all; if it was trained without DP
            on the records that this run protects, or with DP that other ledgers were charged for.
    """
    start = config.adapter.start
    if not start:
        return work.start
    folder = Path(start)
    origin = _origin(start)
    if origin and origin.released:
        _check_run(origin.run_dir, config, work)
        folder = origin.run_dir / "adapter"
    _check_promises(config)
    residuals = config.federation.traits.residuals
    try:
        loaded = open_for(folder, work.start, residuals=residuals)
        scale = saved_scale(folder)
    except InputError as error:
        raise InputError(f"adapter.start is {start}: {error}") from None
    fresh, head = work.start, work.start.only(("head",))
    shaped = all(name in loaded and loaded[name].shape == t.shape for name, t in head.items())
    if not shaped or _labels(folder) not in (None, list(work.labels)):
        loaded = loaded.only(("A", "B", "magnitude", "residual")).updated(head)
    if problem := loaded.validate_against(fresh, residual=residuals):
        raise InputError(
            f"adapter.start is {start}, whose adapter does not fit this run ({problem}); "
            "give an adapter of the same model.name, adapter.method, adapter.rank and "
            "adapter.target-modules"
        )
    if residuals:
        return loaded.updated(_within(loaded, config.federation.residual_rank))
    if scale != Scale(config.adapter.alpha, config.adapter.method.endswith("rslora")):
        raise InputError(
            f"adapter.start is {start}, an adapter of alpha {scale.alpha:g}"
            f"{' with rsLoRA' * scale.rslora}; set adapter.alpha and adapter.method to its own"
        )
    return loaded


def _within(adapter: AdapterState, bound: int) -> dict[str, torch.Tensor]:
    """The residuals, cut back to the nearest ones of the largest rank that rounds may carry."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in adapter.layers().items():
        pair = recompressed(carried(layer), bound)
        found |= zip(residual_names(path), pair, strict=True)
    return found


def _check_run(run_dir: Path, config: RunConfig, work: Trainable) -> None:
    """Check that a run's adapter may be the start of this run. Raises `InputError`."""
    start = f"adapter.start is {config.adapter.start}"
    try:
        result = read_run_file(run_dir)
    except InputError as error:
        raise InputError(f"{start}: {error}") from None
    before = load(run_dir / CONFIG)
    if before.federation.traits.local_parts:
        raise InputError(
            f"{start}, a run with federation.strategy {before.federation.strategy!r}, which has no "
            "adapter for all; start from a run of another strategy"
        )
    if result["base"]["digest"] != work.base.digest:
        raise InputError(
            f"{start}, a run on the base {before.model.name}; model.name {config.model.name} has "
            "other weights: use that base, or start from another adapter"
        )


@dataclass(frozen=True)
class _Origin:
    """The run in whose directory an adapter lies.

    Args:
        run_dir: The run's directory.
        released: Whether the adapter is the one that the run released to all, and not an
            institution's own.
    """

    run_dir: Path
    released: bool


def _origin(start: str) -> _Origin | None:
    """The run in whose directory an adapter lies, at any depth; None if it lies in none."""
    folder = Path(start).resolve()
    for place in (folder, *folder.parents):
        near = place in (folder, folder.parent)  # farther up, a config.toml may be anybody's
        if (place / CONFIG).exists() and (near or (place / ENVIRONMENT).exists()):
            return _Origin(run_dir=place, released=folder in (place, place / "adapter"))
    return None


def _check_promises(config: RunConfig) -> None:
    """Check that what a run starts from reveals nothing that its promise leaves out.

    Raises:
        InputError: Naming the start and the remedy.
    """
    start, privacy = f"adapter.start is {config.adapter.start}", config.privacy
    promised = privacy.enabled and not privacy.protects_nobody
    for earlier, origin in _lineage(config):
        same = _same_records(earlier.data.source, config.data.source)
        if not same:
            continue
        if privacy.hides_institutions:
            raise InputError(
                f"{start}, and a run that it follows had {same}: no ledger adds up two runs for "
                "privacy.institution-epsilon; plan all rounds in one run"
            )
        if not promised:
            continue
        if not origin.released:
            raise InputError(
                f"{start}, and it follows an institution's own adapter of {origin.run_dir}, a run "
                f"on {same}: that run's promise does not cover it; start from the "
                "adapter that the run released"
            )
        if not earlier.privacy.enabled or earlier.privacy.protects_nobody:
            raise InputError(
                f"{start}, and it follows a run without DP on {same}: its adapter may "
                "reveal records that privacy.epsilon promises to protect; start from a run "
                "under DP, or from one on public records"
            )
        ledgers = Path(earlier.privacy.ledger or origin.run_dir / "ledgers")
        if not config.deployed and (
            not ledgers.is_dir() or not privacy.ledger or not ledgers.samefile(privacy.ledger)
        ):
            raise InputError(
                f"{start}, and {origin.run_dir} spent on {same}: privacy.ledger is "
                f"{privacy.ledger or 'not set'}, so this run's epsilon would leave that out; set "
                f"privacy.ledger to {ledgers}, which both runs are then charged to (their limit is "
                "the first run's privacy.max-epsilon), or use fedlora run --resume "
                f"{origin.run_dir} --rounds +N"
            )


def _same_records(one: str, other: str) -> str:
    """What two ``data.source`` have in common, if they may hold the same records; else empty."""
    if one == other or _contents(one) & _contents(other):
        return "the same data.source"
    if one.startswith(tables.MEMORY) and other.startswith(tables.MEMORY):
        return "a table too (two tables count as the same records; read public ones from a file)"
    return ""


def _contents(source: str) -> set[str]:
    """SHA-256 of each file of a source; empty where it has none, or none that can be read here."""
    try:
        files = sources.institution_files(source).values() or [sources.locate(source)]
        return {sha256(file) for file in files}
    except (InputError, OSError):
        return set()


def _lineage(config: RunConfig) -> Iterator[tuple[RunConfig, _Origin]]:
    """The runs that a run follows, the last one first, as far as their directories are here."""
    seen: set[str] = set()
    while (start := config.adapter.start) and start not in seen:
        seen.add(start)
        origin = _origin(start)
        if origin is None:
            return
        config = load(origin.run_dir / CONFIG)
        yield config, origin


def _labels(folder: Path) -> list[str] | None:
    """The classes of an adapter in index order; None where nothing names them."""
    try:
        return json.loads((folder / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None

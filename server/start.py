"""The adapter that a run starts from: a fresh one, or one of an earlier run or a directory.

An earlier run is public where it was on other records, and private where it was on these. What a
private one reveals of these records must be in a ledger: in a deployment each institution has one
for all runs. A simulation has ledgers of its own, so that no private start is allowed there.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fedlora.config import plugins
from fedlora.config.config import INSTITUTIONS, RunConfig, from_flat, load
from fedlora.config.sections import RESIDUAL_RANK
from fedlora.data import records, sources, tables
from fedlora.errors import InputError
from fedlora.files import expanded, sha256
from fedlora.gradients.lora_layers import Scale
from fedlora.models.adapters import AdapterState, open_for, residual_names, saved_scale
from fedlora.models.encoder import is_merged
from fedlora.models.model_files import ONE_INSTITUTION, Origin, origins_of_base
from fedlora.models.trainable import Trainable
from fedlora.runs.finished_run import origins_of_run
from fedlora.runs.model_card import LABELS, is_private, source
from fedlora.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    HOME_CONFIG,
    UNKNOWN,
    is_audited,
    is_complete,
    read_run_file,
)
from fedlora.wire import released
from fedlora.wire.released import ReleaseFiles
from server.run_directory import OTHER, RunState
from strategies.lowrank import carried, recompressed

log = logging.getLogger("fedlora.server")


def start_adapter(config: RunConfig, work: Trainable) -> AdapterState:
    """Read the adapter of ``adapter.start``: a run directory, or the directory of an adapter.

    A head for other classes is left out: the head then starts at zero, since the labels' words are
    read by a base without these factors.

    Args:
        config: The run.
        work: Its model, with the fresh adapter.

    Returns:
        The adapter, with every tensor of the fresh one; the fresh one where nothing is set. Under a
        strategy with residuals the earlier adapter, of any rank and scale, is the residual: such a
        strategy may start each round from factors of its own. Above `RESIDUAL_RANK` it
        is cut back to the nearest one of that rank.

    Raises:
        InputError: If the directory holds no adapter, or one of another base, rank or scale; if it
            is a run that was not completed or has no adapter for all; if it or the base knows
            records that this run protects, and no ledger counts that.
    """
    _check_private(config)
    start = config.adapter.start
    if not start:
        return work.start
    folder = expanded(start)
    origin = _origin(start)
    if origin and origin.released:
        _check_run(origin.run_dir, config, work)
        folder = origin.run_dir / "adapter"
    _check_split(config)
    loaded = _opened(config, work, folder)
    if config.federation.traits.residuals:
        return loaded.updated(_within(loaded, RESIDUAL_RANK))
    return loaded


def _opened(config: RunConfig, work: Trainable, folder: Path) -> AdapterState:
    """The adapter in a directory, if it fits the run. Raises `InputError`."""
    start, fresh = config.adapter.start, work.start
    residuals = config.federation.traits.residuals
    try:
        loaded = open_for(folder, work.start, residuals=residuals)
        scale = saved_scale(folder)
    except InputError as error:
        raise InputError(f"adapter.start is {start}: {error}") from None
    head = {name: torch.zeros_like(tensor) for name, tensor in fresh.only(("head",)).items()}
    shaped = all(name in loaded and loaded[name].shape == t.shape for name, t in head.items())
    if not shaped or _labels(folder) not in (None, list(work.labels)):
        loaded = loaded.only(("A", "B", "magnitude", "residual")).updated(AdapterState(head))
    if problem := loaded.validate_against(fresh, residual=residuals):
        raise InputError(
            f"adapter.start is {start}, whose adapter does not fit this run ({problem}); "
            "give an adapter of the same model.name, adapter.method, adapter.rank and "
            "adapter.target-modules"
        )
    if not residuals and scale != Scale(
        config.adapter.alpha, config.adapter.method.endswith("rslora")
    ):
        raise InputError(
            f"adapter.start is {start}, an adapter of alpha {scale.alpha:g}"
            f"{' with rsLoRA' * scale.rslora}; set adapter.alpha and adapter.method to its own"
        )
    return loaded


def state(
    config: RunConfig, work: Trainable, fingerprint: str, stored: RunState | None
) -> RunState:
    """The state from which a run goes on: its checkpoint, or that before round 1.

    Args:
        config: The run.
        work: Its model.
        fingerprint: That of its records, which must not change before a run is resumed.
        stored: Its checkpoint; None where it begins.

    Raises:
        InputError: If the checkpoint is of other records, base weights, tokens or strategy, or as
            `start_adapter`.
    """
    found = f"{work.base.digest}\n{fingerprint}\n{records.encoding(config)}"
    if name := config.federation.own_code:
        found += f"\n{json.dumps(plugins.describe([('federation.strategy', name)]))}"
    inputs = hashlib.sha256(found.encode()).hexdigest()
    if stored is None:
        adapter = start_adapter(config, work)
        head, dtype = head_start(config, work, adapter), work.base.dtype_name
        return RunState.first(uuid.uuid4().hex, inputs, adapter, dtype=dtype, head=head)
    if stored.inputs != inputs:
        raise InputError(
            f"{config.run_dir} was run on other records, base weights or another tokenizer than "
            "data.source and model.name hold now, or with another federation.strategy; restore "
            f"them, or start anew with {OTHER}"
        )
    if stored.dtype != work.base.dtype_name:
        log.warning(
            "the run was begun with the base model in %s, and here model.dtype %s is %s; its "
            "further rounds follow from other roundings",
            stored.dtype,
            config.model.dtype,
            work.base.dtype_name,
        )
    return stored


def head_start(config: RunConfig, work: Trainable, start: AdapterState) -> str:
    """What the head of a run's first adapter is made of.

    Args:
        config: The run.
        work: Its model.
        start: The `start_adapter`.

    Returns:
        ``zero``; ``start``: the head of ``adapter.start``; ``base``: that of a merged base;
        ``labels``: the labels' words. Empty where the model has no head.
    """
    head = start.only(("head",))
    if not head:
        return ""
    if not any(tensor.any() for tensor in head.values()):
        return "zero"
    if config.adapter.start:
        return "start"
    return "base" if is_merged(cast(Any, work.base.model.config)) else "labels"


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

    def config(self) -> RunConfig:
        """The run's configuration, of models at home that which the institution followed."""
        home = self.run_dir / HOME_CONFIG
        return load(home if home.exists() else self.run_dir / CONFIG)


def _origin(start: str) -> _Origin | None:
    """The run in whose directory an adapter lies, at any depth; None if it lies in none."""
    folder = expanded(start).resolve()
    for place in (folder, *folder.parents):
        near = place in (folder, folder.parent)  # farther up, a config.toml may be anybody's
        if near and (place / HOME_CONFIG).exists():  # of `fedlora home`
            return _Origin(run_dir=place, released=False)
        if (place / CONFIG).exists() and (near or (place / ENVIRONMENT).exists()):
            return _Origin(run_dir=place, released=folder in (place, place / "adapter"))
    return None


def origins(config: RunConfig) -> list[Origin]:
    """The runs whose records the start of a run may know: those that it follows, those of its base.

    A start that is gone meanwhile counts as one without a promise. An adapter in no run's directory
    counts as public, as a base model does.

    Args:
        config: The run.
    """
    start, found = config.adapter.start, origins_of_base(config.model.name)
    if start and not expanded(start).exists():
        found.append(Origin(run=UNKNOWN, source=Path(start).name, private=False))
    for start in [config.adapter.start, *(one.adapter.start for one, _ in _lineage(config))]:
        if (one := _handed_out(start)) is not None:
            followed = from_flat(one.config)
            private = is_private(followed) and followed.privacy.promises
            found += [Origin(run=one.run, source=INSTITUTIONS, private=private), *one.origins]
    for earlier, origin in _lineage(config):
        result = read_run_file(origin.run_dir) if is_complete(origin.run_dir) else {}
        own_model = not origin.released
        private = is_private(earlier, own_model=own_model) and earlier.privacy.promises
        found += origins_of_run(
            origin.run_dir, earlier, result, own_model=own_model, private=private
        )
        found += result.get("origins", [])
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _check_private(config: RunConfig) -> None:
    """Check that what a run starts from knows nothing of the records that its promise leaves out.

    Raises:
        InputError: Naming the start and the run that knows too much.
    """
    start = f"adapter.start is {config.adapter.start}, model.name is {config.model.name}"
    known = [(origin["run"], _uncounted(config, origin)) for origin in origins(config)]
    for earlier, origin in _lineage(config):
        if is_audited(origin.run_dir):
            raise InputError(
                f"{start}, and {origin.run_dir} is an audited run, which was trained on planted "
                "records too; start from the run itself"
            )
        if _protects(config) and not config.deployed and _same_records(earlier, config):
            known.append((str(origin.run_dir), "the same data.source"))
    for run, same in known:
        if same:
            raise InputError(
                f"{start}, and it goes back to the run {run} on {same}: what that reveals of these "
                "records would be in no figure of this run; start from an adapter and a base of "
                "public records, or plan all rounds in one run"
            )


def _protects(config: RunConfig) -> bool:
    return config.privacy.promises or config.privacy.hides_institutions


def _uncounted(config: RunConfig, origin: Origin) -> str:
    """What records a run may have in common with one behind its start that no ledger counts.

    Empty where there are none. A deployed run names no institution's file, and of what is gone
    nobody knows the records: either counts as in common.
    """
    if not _protects(config):
        return ""
    if origin["run"] == UNKNOWN:
        return "records that nobody knows"
    of_institutions = origin["source"] in (INSTITUTIONS, ONE_INSTITUTION)
    hides = config.privacy.hides_institutions
    if of_institutions and (config.deployed or hides or not origin["private"]):
        whole = origin["source"] == INSTITUTIONS  # of one institution's own model no ledger knows
        counted = config.deployed and origin["private"] and not hides and whole
        return "" if counted else "records of institutions, which this run may be on too"
    names = source(config), origin["source"]
    if all(name.startswith(tables.MEMORY) for name in names):
        return "a table too (two tables count as the same records; read public ones from a file)"
    return f"a data.source of this name ({names[0]})" if names[0] == names[1] else ""


def _check_split(config: RunConfig) -> None:
    """Check that no run which this one follows trained on the rows that this one holds out.

    Raises:
        InputError: If one had the same records and other held-out rows.
    """
    if config.deployed:  # each institution holds its own rows out
        return
    now = config.flat()
    for earlier, _ in _lineage(config):
        before = earlier.flat()
        keys = ("seed", "data.text", "data.label", "data.test-source", "data.test-fraction")
        other = next((key for key in keys if before[key] != now[key]), "")
        if other and _same_records(earlier, config):
            raise InputError(
                f"adapter.start is {config.adapter.start}, which was trained on these records by "
                f"another split ({other} {before[other]!r}, here {now[other]!r}): it knows some of "
                f"the rows that this run holds out; give the {other} of that run"
            )


def _same_records(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs have one ``data.source``, by name or by content."""
    sources_of = one.data.source, other.data.source
    return sources_of[0] == sources_of[1] or bool(
        _contents(sources_of[0]) & _contents(sources_of[1])
    )


def _contents(source: str) -> set[str]:
    """SHA-256 of each file of a source; empty where it has none, or none that can be read here."""
    try:
        files = sources.institution_files(source).values() or [sources.locate(source)]
        return {sha256(file) for file in files}
    except (InputError, OSError):
        return set()


def _handed_out(start: str) -> ReleaseFiles | None:
    """A released adapter that an institution keeps, or got, outside of a run's directory."""
    folder = expanded(start)
    known = bool(start) and (folder / released.FILE).exists() and _origin(start) is None
    return ReleaseFiles.open(folder) if known else None


def _lineage(config: RunConfig) -> Iterator[tuple[RunConfig, _Origin]]:
    """The runs that a run follows, the last one first, as far as their directories are here."""
    seen: set[str] = set()
    while (start := config.adapter.start) and start not in seen:
        seen.add(start)
        origin = _origin(start)
        if origin is None:
            return
        config = origin.config()
        yield config, origin


def _labels(folder: Path) -> list[str] | None:
    """The classes of an adapter in index order; None where nothing names them."""
    try:
        return json.loads((folder / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None

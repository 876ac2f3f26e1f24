"""The adapter that a run starts from: a fresh one, or one of an earlier run or a directory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fedlora.config.config import INSTITUTIONS, RunConfig, from_flat, load
from fedlora.config.sections import RESIDUAL_RANK
from fedlora.data import sources, tables
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
    LEDGERS,
    PRIVACY,
    UNKNOWN,
    is_audited,
    is_complete,
    made_at_home,
    read_run_file,
)
from fedlora.wire import released
from fedlora.wire.released import ReleaseFiles
from strategies.lowrank import carried, recompressed

OF_ONE = "records of an institution, which this run may be on too"
OF_INSTITUTIONS = "records of institutions, which this run may be on too"


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
            is a run that was not completed or has no adapter for all; if it was trained without DP
            on the records that this run protects, or with DP that other ledgers were charged for;
            if the base was merged from a run on these records.
    """
    _check_base(config)
    start = config.adapter.start
    if not start:
        return work.start
    folder = expanded(start)
    origin = _origin(start)
    if origin and origin.released:
        _check_run(origin.run_dir, config, work)
        folder = origin.run_dir / "adapter"
    _check_promises(config)
    _check_recorded(config)
    _check_split(config)
    residuals = config.federation.traits.residuals
    try:
        loaded = open_for(folder, work.start, residuals=residuals)
        scale = saved_scale(folder)
    except InputError as error:
        raise InputError(f"adapter.start is {start}: {error}") from None
    fresh = work.start
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
    if residuals:
        return loaded.updated(_within(loaded, RESIDUAL_RANK))
    if scale != Scale(config.adapter.alpha, config.adapter.method.endswith("rslora")):
        raise InputError(
            f"adapter.start is {start}, an adapter of alpha {scale.alpha:g}"
            f"{' with rsLoRA' * scale.rslora}; set adapter.alpha and adapter.method to its own"
        )
    return loaded


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


def _handed_out(start: str) -> ReleaseFiles | None:
    """A released adapter that an institution keeps, or got, outside of a run's directory."""
    folder = expanded(start)
    known = bool(start) and (folder / released.FILE).exists() and _origin(start) is None
    return ReleaseFiles.open(folder) if known else None


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
    if (one := _handed_out(start)) is not None:
        followed = from_flat(one.config)
        private = is_private(followed) and followed.privacy.promises
        found += [Origin(run=one.run, source=INSTITUTIONS, private=private), *one.origins]
    for earlier, origin in _lineage(config):
        complete = is_complete(origin.run_dir)
        result = read_run_file(origin.run_dir) if complete else {}
        own_model = not origin.released
        private = is_private(earlier, own_model=own_model) and earlier.privacy.promises
        found += origins_of_run(
            origin.run_dir, earlier, result, own_model=own_model, private=private
        )
        found += result.get("origins", [])
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _check_base(config: RunConfig) -> None:
    """Check that the base was not trained on the records that a run promises to protect.

    Raises:
        InputError: If the base was merged from a run on a source of the same name, or from one that
            follows such a run; any two tables in memory count as the same.
    """
    for origin in origins_of_base(config.model.name):
        if same := _uncounted(config, origin):
            raise InputError(
                f"model.name is {config.model.name}, and the run {origin['run']}, from which it "
                f"was merged, was on {same}: what it reveals of these records would be in no "
                "figure of this run; take another base, or, if that run was under DP on the same "
                "records, its base, and its adapter as adapter.start"
            )


def _uncounted(config: RunConfig, origin: Origin) -> str:
    """What the sources of a run and of one behind its start have in common by their names.

    A deployed run names no institution's file, and of what is gone nobody knows the records: either
    counts as in common. Empty where they have nothing in common, where the run promises nothing,
    and where ledgers have the earlier run: in a deployment each institution has one for all runs.
    """
    privacy, names = config.privacy, (source(config), origin["source"])
    if not privacy.promises and not privacy.hides_institutions:
        return ""
    if config.deployed and origin["source"] == ONE_INSTITUTION:
        return OF_ONE
    if config.deployed and origin["private"] and not privacy.hides_institutions:
        return ""
    if origin["run"] == UNKNOWN:
        return "records that nobody knows"
    hidden = privacy.hides_institutions or not origin["private"]
    if not config.deployed and origin["source"] == INSTITUTIONS and hidden:
        return OF_INSTITUTIONS
    if all(name.startswith(tables.MEMORY) for name in names):
        return "a table too"
    return f"a data.source of this name ({names[0]})" if names[0] == names[1] else ""


def _check_recorded(config: RunConfig) -> None:
    """Check the runs that earlier runs say to go back to and whose directories are gone.

    Where an earlier run was on the same records as this one and as those before it, it was charged
    to the ledgers of these.

    Raises:
        InputError: If one of them was on a source of this run's name.
    """
    start = config.adapter.start
    followed = [(earlier, origin.run_dir, read_run_file(origin.run_dir))
                for earlier, origin in _lineage(config) if is_complete(origin.run_dir)]  # fmt: skip
    # `fedlora home` names the run whose adapter it took, which need not be here
    here = {result.get("run", run_dir.name) for _, run_dir, result in followed
            if not made_at_home(run_dir)}  # fmt: skip
    for earlier, _, result in followed:
        for origin in result.get("origins", []):
            counted = (
                origin["private"]
                and origin["source"] == source(earlier)
                and _same_records(earlier.data.source, config.data.source)
            )
            if origin["run"] in here or counted:
                continue
            if same := _uncounted(config, origin):
                raise _goes_back(start, origin, same)
    for start in _starts(config):
        for origin in handed_out.origins if (handed_out := _handed_out(start)) else ():
            if same := _uncounted(config, origin):
                raise _goes_back(config.adapter.start, origin, same)


def _goes_back(start: str, origin: Origin, same: str) -> InputError:
    return InputError(
        f"adapter.start is {start}, and it goes back to the run {origin['run']} on {same}: what "
        "that reveals of these records would be in no figure of this run; start from another "
        "adapter"
    )


def _starts(config: RunConfig) -> list[str]:
    """The start of a run, and those of the runs that it follows."""
    return [config.adapter.start, *(one.adapter.start for one, _ in _lineage(config))]


def _check_split(config: RunConfig) -> None:
    """Check that no run which this one follows trained on the rows that this one holds out.

    Raises:
        InputError: If one had the same records and other held-out rows.
    """
    if config.deployed:  # each institution holds its own rows out
        return
    start, now = f"adapter.start is {config.adapter.start}", config.flat()
    apart = config.data.test_source
    keys = ("data.test-source", "data.text")
    if not apart:
        keys += ("data.label", "data.test-fraction", "seed")
    for earlier, _ in _lineage(config):
        if apart and _one_file(earlier.data.source, apart):
            raise InputError(
                f"{start}, which was trained on data.test-source {apart}; measure on other rows"
            )
        before = earlier.flat()
        other = next((key for key in keys if before[key] != now[key]), "")
        if not apart and bool(before["data.labels"]) != bool(now["data.labels"]):
            other = other or "data.labels"  # a list of classes lets a class's only text be held out
        if other and _one_file(earlier.data.source, config.data.source):
            raise InputError(
                f"{start}, which was trained on these records by another split ({other} "
                f"{before[other]!r}, here {now[other]!r}): it knows some of the rows that this run "
                f"holds out; give the {other} of that run"
            )


def _check_promises(config: RunConfig) -> None:
    """Check that what a run starts from reveals nothing that its promise leaves out.

    Raises:
        InputError: Naming the start and the remedy.
    """
    start, privacy = f"adapter.start is {config.adapter.start}", config.privacy
    for handed_out in filter(None, map(_handed_out, _starts(config))):
        promised = from_flat(handed_out.config).privacy.promises
        if privacy.hides_institutions or (privacy.promises and not promised):
            raise InputError(
                f"{start}, and the run {handed_out.name} released what it goes back to: that may "
                "reveal records that this run promises to protect, and is in no figure of it; "
                "start from an adapter of public records"
            )
    for earlier, origin in _lineage(config):
        if is_audited(origin.run_dir):
            raise InputError(
                f"{start}, and {origin.run_dir} is an audited run, which was trained on planted "
                "records too; start from the run itself"
            )
        same = _shared_records(config, earlier, origin)
        if not same:
            continue
        if privacy.hides_institutions:
            raise InputError(
                f"{start}, and a run that it follows had {same}: no ledger adds up two runs for "
                "privacy.institution-epsilon; plan all rounds in one run"
            )
        if not privacy.promises:
            continue
        if not origin.released:
            raise InputError(
                f"{start}, and it follows an institution's own adapter of {origin.run_dir}, a run "
                f"on {same}: that run's promise does not cover it; start from the "
                "adapter that the run released"
            )
        if not earlier.privacy.promises:
            raise InputError(
                f"{start}, and it follows a run without DP on {same}: its adapter may "
                "reveal records that privacy.epsilon promises to protect; start from a run "
                "under DP, or from one on public records"
            )
        if not config.deployed:
            _check_ledgers(config, earlier, origin.run_dir, same)


def _check_ledgers(config: RunConfig, earlier: RunConfig, run_dir: Path, same: str) -> None:
    """Check that the ledgers of a simulation add up what an earlier one spent on these records.

    Args:
        config: The simulation.
        earlier: The one that it follows.
        run_dir: That one's directory.
        same: What their sources have in common.

    Raises:
        InputError: Naming the start and the remedy.
    """
    start = f"adapter.start is {config.adapter.start}"
    if changed := _assigned_otherwise(earlier, config):
        raise InputError(
            f"{start}, and {run_dir} spent on {same}, whose records it assigned to "
            f"institutions in another way ({changed} is other): their ledgers would not add up "
            f"both runs; give the {changed} of that run"
        )
    given = config.privacy.ledger and expanded(config.privacy.ledger)
    ledgers = Path(earlier.privacy.ledger or run_dir / LEDGERS)
    if not (given and ledgers.is_dir() and given.is_dir() and ledgers.samefile(given)):
        raise InputError(
            f"{start}, and {run_dir} spent on {same}: privacy.ledger is "
            f"{given or 'not set'}, so this run's epsilon would leave that out; set "
            f"privacy.ledger to {ledgers}, which both runs are then charged to (their limit is "
            "the first run's privacy.max-epsilon)"
        )
    for name in _spenders(run_dir):
        if not (ledgers / f"{name}.db").is_file():
            raise InputError(
                f"{start}, and {ledgers} has no ledger of {name}, which spent in "
                f"{run_dir}, so nobody knows what is spent already; restore it"
            )


def _assigned_otherwise(earlier: RunConfig, config: RunConfig) -> str:
    """The first key by which records of one source have other institutions; empty if none.

    Where a column names the institutions, a name stands for the same records, and its ledger
    refuses others.
    """
    before, now = earlier.flat(), config.flat()
    if (before["data.view"] == "pooled") != (now["data.view"] == "pooled"):
        return "data.view"
    keys = ["data.partition"]
    if not str(before["data.partition"]).startswith("natural:"):
        free = ("data.source", "data.test-source", "data.view")
        keys += ["seed", *(key for key in now if key.startswith("data.") and key not in free)]
    return next((key for key in keys if before[key] != now[key]), "")


def _spenders(run_dir: Path) -> list[str]:
    """The institutions that spent in a run, or may have."""
    said = read_run_file(run_dir, PRIVACY)
    return [*said["institutions"], *said.get("without_report", ())]


def _one_file(one: str, other: str) -> bool:
    """Whether two sources have a file in common. Nobody knows it of tables in memory."""
    in_memory = one.startswith(tables.MEMORY) or other.startswith(tables.MEMORY)
    return not in_memory and bool(_same_records(one, other))


def _shared_records(config: RunConfig, earlier: RunConfig, origin: _Origin) -> str:
    """What records a run may have in common with one that it follows; empty if none."""
    same = _same_records(earlier.data.source, config.data.source)
    if config.deployed and not origin.released:  # nobody here knows of which records
        return same or OF_ONE
    hidden = config.privacy.hides_institutions or not earlier.privacy.promises
    if earlier.deployed and not config.deployed and hidden:
        return OF_INSTITUTIONS
    return same


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
        config = origin.config()
        yield config, origin


def _labels(folder: Path) -> list[str] | None:
    """The classes of an adapter in index order; None where nothing names them."""
    try:
        return json.loads((folder / LABELS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None

"""``fedlora home``: an institution's own models after a run, on its own machine.

The command reads the institution's settings, records and held-out rows, and the adapter that the
run released. Nothing that it computes is sent.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import config_policy, home_cohort
from client.home_cohort import Member
from client.institution import Institution
from client.ledger import Ledger
from client.releases import Releases
from client.settings import Settings
from fedlora.config.config import RunConfig
from fedlora.config.sections import HOME_CHOOSES_FROM, INSTITUTIONS, HomeConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.files import new_path, sync, write_atomic
from fedlora.models import trainable
from fedlora.models.model_files import Origin, origins_of_base
from fedlora.rounding import at_most
from fedlora.runs import comparison
from fedlora.runs.comparison import Rows
from fedlora.runs.joining_verdict import (
    ALL_KEEP,
    FINDINGS,
    MODELS,
    has_interval,
    interval,
    macro_f1_gain,
    outcome,
)
from fedlora.runs.run_files import HOME_CONFIG, finite
from fedlora.wire.released import ReleaseFiles

LOCK = "home.lock"
SPLIT = 0.2
"""Share of the records that are held back where the settings name no ``test-source``."""
TEST_SOURCE = "test-source"
OTHER_RUNS = (
    "The intervals are of other held-out rows; another run of the federation, with other noise, "
    "could say something else."
)
UNCERTAIN = {
    "split": (
        "without a test-source",
        "The settings name no test-source, so a seeded fifth of the records was held back. If the "
        "institution took part, the run trained on these rows too: the figures of shared and own "
        "can be too high",
    ),
    "other-records": (
        "with other records or another test-source than those of the run",
        "The ledger is of other records than those that the settings give now. The run may have "
        "trained on rows that are held out today, and the model alone on rows that the run did not "
        "have: the figures can favour either. Put records and test-source back as they were",
    ),
    "no-ledger": (
        "while the ledger cannot be opened",
        "Only the ledger shows that the run had the records that the settings give now; if it had "
        "others, the figures can favour either",
    ),
}
"""Why held-out rows cannot tell whether joining pays: a condition, and a sentence."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices of the institution's own command.

    Args:
        run: The run's name or identity; with ``adapter`` it may be empty, else it must be that
            adapter's.
        adapter: A directory that the operator handed out; None: the adapter that arrived.
        method: As ``home.method``; empty: the run's.
        steps: As ``home.steps``; 0: the run's.
        epsilon: The budget of the own model; infinite: no DP.
        out: The directory to write; None: ``state/home/NAME``.
    """

    run: str = ""
    adapter: Path | None = None
    method: str = ""
    steps: int = 0
    epsilon: float = math.inf
    out: Path | None = None


def train(own: Settings, choices: Choices, say: Callable[[str], None]) -> dict[str, Any]:
    """Train an institution's models after a run and compare them on its held-out rows.

    Args:
        own: The institution's settings.
        choices: The choices of the command line.
        say: Called with a line of progress.

    Returns:
        The content of ``result.json``, with ``directory``.

    Raises:
        InputError: For bad input, before any training or charge, and for a model alone whose
            training diverged, before a charge; no result is written then.
        FileExistsError: If another command made the directory of the results meanwhile; it names
            the one where they are.
        Refusal: For a run that the settings forbid, and under DP for a budget that does not last.
    """
    started = time.monotonic()
    found = _release(own, choices)
    config = _config(own, choices, found)
    state = Path(own.state)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    out = choices.out or state / "home" / found.name
    if choices.out is None:
        out.parent.mkdir(exist_ok=True, mode=0o700)
    begin = _unfinished(state, out)
    with (
        _without_leftovers(state, out.parent, begin),
        _private_cache(state),
        _new_directory(out, begin) as new,
    ):
        institution = dataclasses.replace(Institution.deployed(own, config), directory=new)
        federation = records.load(config)
        train_rows, held_out = federation.train(0), federation.held_out(0)
        if not len(held_out):
            raise InputError(
                f"none of the {len(train_rows)} records was set aside as a held-out row (each is "
                f"with probability {SPLIT:g}); name a test-source with rows of its own"
                if not own.test_source
                else f"test-source {own.test_source} has no row that can be held out; name one "
                "with rows of its own"
            )
        held_out_from = _held_out_from(own, config, found.run, train_rows)
        work = trainable.load(config, federation.labels)
        shared = found.adapter(work, residuals=config.federation.traits.residuals)
        say(f"run {found.name}: {len(train_rows)} records, {len(held_out)} held-out rows")
        if config.home.private:
            say(f"own: {config.home.steps} steps at epsilon {config.home.epsilon:g}")
        plain = "alone" if config.home.private else "alone and own"
        if len(train_rows) >= HOME_CHOOSES_FROM:
            steps = f"up to {config.home.steps} steps on four fifths of the records, then on all"
        else:
            steps = f"{config.home.steps_without_choice} steps"
        say(f"{plain}: {steps}")
        home = institution.home(shared)
        member = Member(institution=institution, run=found.run, home=home)
        models = home_cohort.train({0: member})[0]
        if isinstance(models, Exception):
            raise models
        say("comparing alone, shared and own")
        said = institution.compare(shared, models).metrics
        texts = comparison.text_numbers(held_out)
        rows = Rows.of(train_rows, held_out, texts, said, len(federation.labels))
        compared = comparison.summary({own.name: rows}, federation.labels)
        result = {
            "institution": own.name,
            "run": found.run,
            "name": found.name,
            "records": len(train_rows),
            "held_out": {
                "rows": len(held_out),
                "from": held_out_from,
            },
            **{model: compared[model] for model in MODELS},
            "gain": {key: compared["gain"][key] for key in ("mean", "low", "high", "texts")},
            "gain_shared": compared["gain_shared"],
            "gain_macro_f1": compared["gain_macro_f1"],
            "choices": {
                **rows.choice,
                **({} if config.home.private else {"method": config.home.method}),
                "steps": config.home.steps,
            },
            "privacy": models.private and finite(dataclasses.asdict(models.private.privacy)),
            "base": {
                "digest": work.base.digest,
                "dtype": work.base.dtype_name,
            },
            "labels": list(work.labels),
            "origins": _origins(config, found),
            "seconds": round(time.monotonic() - started, 2),
        }
        kept = config.replace({"run-dir": str(out.absolute())})
        write_atomic(new / HOME_CONFIG, kept.to_toml().encode())
        write_atomic(new / "result.json", (json.dumps(result, indent=2) + "\n").encode())
        write_atomic(new / "report.txt", ("\n".join(report(result)) + "\n").encode())
    return {**result, "directory": str(out)}


def report(result: dict[str, Any]) -> list[str]:
    """The lines of ``report.txt``."""
    held_out, chosen = result["held_out"], result["choices"]
    lines = [
        f"{result['institution']} after run {result['name']}: {result['records']} records, "
        f"{held_out['rows']} held-out rows",
        "",
        f"{'model':8}{'accuracy':>10}{'macro-F1':>10}",
        *(
            f"{model:8}{result[model]['accuracy']:10.4f}{result[model]['macro_f1']:10.4f}"
            for model in MODELS
        ),
        "",
        f"{_finding(result)}.",
        f"In macro-F1: {macro_f1_gain(result['gain_macro_f1'])}.",
        f"Shared over alone: {interval(result['gain_shared'])}.",
        _made(chosen),
    ]
    if has_interval(result["gain"]):
        lines.append(OTHER_RUNS)
    if held_out["from"] != TEST_SOURCE:
        lines.append(f"{UNCERTAIN[held_out['from']][1]}.")
    if result["privacy"] is None:
        lines.append("The own model has no differential privacy and must not leave.")
    else:
        lines.append(
            f"The own model was trained at epsilon {at_most(result['privacy']['epsilon'])}, delta "
            f"{result['privacy']['delta']:g}; the figures above are not covered by it."
        )
    return lines


def _made(chosen: dict[str, Any]) -> str:
    """By what steps and weight the models were made."""
    steps = f"Steps: alone {chosen['alone_steps']}, own {chosen['own_steps']}; "
    if chosen["keeps_alone"]:
        return (
            steps + "the own model is the model alone, which was right more often on training "
            "records held back."
        )
    return steps + f"weight of the trained adapter in the own model {chosen['weight']:g}."


def _finding(result: dict[str, Any]) -> str:
    """Whether joining pays, where rows can tell on which the run did not train."""
    if result["choices"]["keeps_alone"]:
        return ALL_KEEP
    if (held_out := result["held_out"]["from"]) == TEST_SOURCE:
        said = FINDINGS[outcome(result)]
    else:
        said = f"Whether joining pays cannot be said {UNCERTAIN[held_out][0]}"
    return f"{said}: own against alone {interval(result['gain'])}"


def _held_out_from(own: Settings, config: RunConfig, run: str, rows: Shard) -> str:
    """Where the held-out rows are from: `TEST_SOURCE`, or a key of `UNCERTAIN`.

    The ledger proves that a run under DP trained on other rows. It knows nothing of runs without.
    """
    if not own.test_source:
        return "split"
    if not config.privacy.enabled:
        return TEST_SOURCE
    try:
        ledger = Ledger.look(own.ledger)
    except Refusal:
        return "no-ledger"
    with ledger:
        if run in ledger.runs():
            try:
                ledger.is_bound(rows.fingerprint, config.privacy.unit)
            except Refusal:
                return "other-records"
    return TEST_SOURCE


def _origins(config: RunConfig, found: ReleaseFiles) -> list[Origin]:
    """The run that released the adapter, and those behind its start and base."""
    run = Origin(run=found.run, source=INSTITUTIONS, private=config.privacy.promises)
    base = [one for one in origins_of_base(config.model.name) if one not in found.origins]
    return [run, *found.origins, *base]


def _release(own: Settings, choices: Choices) -> ReleaseFiles:
    """The released adapter that the command line names."""
    if choices.adapter is None:
        return Releases(Path(own.state)).find(choices.run)
    found = ReleaseFiles.open(choices.adapter)
    if choices.run not in ("", found.name, found.run):
        raise InputError(
            f"--run is {choices.run!r}, but the adapter in {choices.adapter} is of run "
            f"{found.name}; give that name, or leave --run out"
        )
    return found


def _config(own: Settings, choices: Choices, found: ReleaseFiles) -> RunConfig:
    """The run's configuration as the institution followed it, with its own choices for home."""
    config = config_policy.apply(own, found.config)
    wish = HomeConfig.method if config.home.method == "none" else config.home.method
    values: dict[str, Any] = {
        "home.method": choices.method or wish,
        "home.steps": choices.steps or config.home.steps,
        "home.epsilon": choices.epsilon,
    }
    if not own.test_source:
        values["data.test-fraction"] = SPLIT
    if values["home.method"] == "none":
        raise InputError("--method is none, which trains no model; name another, or leave it out")
    if config.model.task != "classification":
        raise InputError(
            f"run {found.name} has the task {config.model.task}; models at home are compared for "
            "classification only"
        )
    if choices.adapter is not None and config.federation.traits.local_parts:
        raise InputError(
            f"--adapter is {choices.adapter}, but under {config.federation.strategy} a part of the "
            "adapter stays at the institution; use --run, for which the node must be online at the "
            "end of a run"
        )
    if choices.epsilon < math.inf:
        if choices.method:
            raise InputError(
                f"--method is {choices.method!r}, but with --epsilon an own model is trained by "
                "steps of DP-SGD from the shared one, whatever the method; leave one of them out"
            )
        if not own.test_source:
            raise InputError(
                "--epsilon needs a test-source in the settings: the ledger belongs to all records, "
                "so that none of them can be held back"
            )
        if not config.privacy.enabled:
            raise InputError(
                f"--epsilon is {choices.epsilon:g}, but run {found.name} had no DP, so its adapter "
                "may reveal records, and a model that starts from it may too; leave --epsilon out"
            )
    return config.replace(values)


@contextlib.contextmanager
def _without_leftovers(state: Path, place: Path, begin: str) -> Generator[None]:
    """Remove the records and models that killed commands left in the state or in ``place``.

    A command shares a lock until it ends, however it ends. Only a command that has the lock alone
    removes anything, and it does so before it makes directories of its own.
    """
    with (state / LOCK).open("w") as lock:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            beside = place.glob(f"{glob.escape(begin)}*")
            for left in (*state.glob(".cache-*"), *state.glob("home/.new-*"), *beside):
                shutil.rmtree(left, ignore_errors=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _unfinished(state: Path, out: Path) -> str:
    """The beginning of the name of a directory that becomes ``out``, beside it.

    It is of one state: several institutions may write beside each other.
    """
    of = hashlib.sha256(os.fsencode(state.absolute())).hexdigest()[:8]
    return f".new-{of}-{out.name}-"


@contextlib.contextmanager
def _private_cache(state: Path) -> Generator[None]:
    """Keep tokenised records in the institution's state, and delete them at the end."""
    before = os.environ.get("FEDLORA_CACHE")
    with tempfile.TemporaryDirectory(dir=state, prefix=".cache-") as cache:
        os.environ["FEDLORA_CACHE"] = cache
        try:
            yield
        finally:
            if before is None:
                del os.environ["FEDLORA_CACHE"]
            else:
                os.environ["FEDLORA_CACHE"] = before


@contextlib.contextmanager
def _new_directory(out: Path, begin: str) -> Generator[Path]:
    """A directory for its owner only, in its place when the block has ended without an error.

    Raises:
        FileExistsError: If the place was taken meanwhile; it names the one beside it that was not.
    """
    new = Path(tempfile.mkdtemp(dir=new_path(out), prefix=begin))
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        new.rename(out)
    except OSError:
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{out.name}-"))
        new.rename(beside)
        raise FileExistsError(
            f"{out} was made by another command; the models are in {beside}"
        ) from None
    sync(out.absolute().parent)

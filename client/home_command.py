"""``fedlora home``: an institution's own models after a run, on its own machine.

The command reads the institution's settings, records and held-out rows, and the adapter that the
run released. Nothing that it computes is sent.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import config_policy, measurement
from client.institution import Institution
from client.ledger import Ledger
from client.releases import Releases
from client.settings import Settings
from fedlora.config.config import RunConfig
from fedlora.config.sections import INSTITUTIONS
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.files import new_path, sync, write_atomic
from fedlora.models import trainable
from fedlora.models.model_files import Origin, origins_of_base
from fedlora.runs import comparison
from fedlora.runs.comparison import Rows
from fedlora.runs.joining_verdict import FINDINGS, MODELS, interval, outcome
from fedlora.runs.run_files import HOME_CONFIG
from fedlora.wire.released import ReleaseFiles

SPLIT = 0.2
"""Share of the records that are held back where the settings name no ``test-source``."""
TEST_SOURCE = "test-source"
UNCERTAIN = {
    "split": "The settings name no test-source, so a fifth of the records was held back. If the "
    "run trained on these rows too, the figures of shared and own are too high.",
    "other-records": "The ledger is of other records than those that the settings give now: the "
    "figures can favour either model. Put records and test-source back as they were.",
    "no-ledger": "The ledger cannot be opened. Only it shows that the run had the records that the "
    "settings give now.",
}
"""Why held-out rows cannot tell whether joining pays."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The choices of the institution's own command.

    Args:
        run: The run's name or identity; with ``adapter`` it may be empty, else it must be that
            adapter's.
        adapter: A directory that the operator handed out; None: the adapter that arrived.
        steps: As ``home.steps``; 0: the run's.
    """

    run: str = ""
    adapter: Path | None = None
    steps: int = 0


def train(own: Settings, choices: Choices, say: Callable[[str], None]) -> dict[str, Any]:
    """Train an institution's models after a run and compare them on its held-out rows.

    Args:
        own: The institution's settings.
        choices: The choices of the command line.
        say: Called with a line of progress.

    Returns:
        The content of ``result.json``, with ``directory``.

    Raises:
        InputError: For bad input, before any training, and for a model alone whose training
            diverged; no result is written then.
        FileExistsError: If another command made the directory of the results meanwhile.
        Refusal: For a run that the settings forbid.
    """
    started = time.monotonic()
    found = _release(own, choices)
    config = _config(own, choices, found)
    state = Path(own.state)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    out = state / "home" / found.name
    out.parent.mkdir(exist_ok=True, mode=0o700)
    with _new_directory(out) as new:
        institution = dataclasses.replace(Institution.deployed(own, config), directory=new)
        federation = records.load(config)
        train_rows, held_out = federation.train(0), federation.held_out(0)
        if not len(held_out):
            raise InputError(
                f"no row of {own.test_source or own.source} can be held out; name a test-source "
                "with rows of its own"
            )
        work = trainable.load(config, federation.labels)
        shared = found.adapter(work, residuals=config.federation.traits.residuals)
        say(
            f"run {found.name}: {len(train_rows)} records, {len(held_out)} held-out rows; training "
            f"alone and own, {config.home.steps} steps each"
        )
        said = measurement.compare_at_home(institution, shared).metrics
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
                "from": _held_out_from(own, config, found.run, train_rows),
            },
            **{model: compared[model] for model in MODELS},
            "gain": {key: compared["gain"][key] for key in ("mean", "low", "high", "texts")},
            "gain_shared": compared["gain_shared"],
            "choices": {**rows.choice, "steps": config.home.steps},
            "base": {"digest": work.base.digest, "dtype": work.base.dtype_name},
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
    gain = interval(result["gain"])
    if held_out["from"] == TEST_SOURCE:
        said = f"{FINDINGS[outcome(result)]}: own against alone {gain}."
    else:
        said = f"Own against alone {gain}. {UNCERTAIN[held_out['from']]}"
    made = f"the adapter trained at home has weight {chosen['weight']:g}"
    return [
        f"{result['institution']} after run {result['name']}: {result['records']} records, "
        f"{held_out['rows']} held-out rows",
        "",
        f"{'model':8}{'accuracy':>10}{'macro-F1':>10}",
        *(
            f"{model:8}{result[model]['accuracy']:10.4f}{result[model]['macro_f1']:10.4f}"
            for model in MODELS
        ),
        "",
        said,
        f"Own model: {'the model alone' if chosen['keeps_alone'] else made}.",
        "The own model has no differential privacy and must not leave.",
    ]


def _held_out_from(own: Settings, config: RunConfig, run: str, rows: Shard) -> str:
    """Where the held-out rows are from: `TEST_SOURCE`, or a key of `UNCERTAIN`.

    The ledger proves that a run under DP trained on other rows. It knows nothing of runs without.
    """
    if not own.test_source:
        return "split"
    if not config.privacy.enabled:
        return TEST_SOURCE
    try:
        ledger = Ledger.open(own.ledger)
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
    values: dict[str, Any] = {
        "home.method": "interpolate",
        "home.steps": choices.steps or config.home.steps,
    }
    if not own.test_source:
        values["data.test-fraction"] = SPLIT
    return config.replace(values)


@contextlib.contextmanager
def _new_directory(out: Path) -> Generator[Path]:
    """A directory for its owner only, in its place when the block has ended without an error.

    Raises:
        FileExistsError: If the place was taken meanwhile.
    """
    new = Path(tempfile.mkdtemp(dir=new_path(out), prefix=".new-"))
    try:
        yield new
        if out.exists():
            raise FileExistsError(f"{out} was made by another command; give another --out")
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync(out.absolute().parent)

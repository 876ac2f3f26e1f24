"""`fedlora report`: one page on a run, a sweep or an audit, for readers who are no researchers.

Reads the directory only: no model, no records, no torch. Each page is a template over a plain
dictionary. The page of a run in progress is rewritten after each round, and the browser reloads it.
"""

import contextlib
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jinja2

import fedlora
from experiments import results
from experiments.audit import findings
from fedlora.config.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models import metrics
from fedlora.rounding import at_least, at_most, duration
from fedlora.runs import joining_verdict
from fedlora.runs.joining_verdict import MODELS
from fedlora.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    PRIVACY,
    RESULT,
    ROUNDS,
    read_records,
    read_run_file,
    void,
)
from server.privacy_statement import epsilon_alone, largest_epsilon, with_earlier_runs

FILE = "report.html"
LIVE_SECONDS = 3.0
"""Seconds between two looks at a run in progress."""
VERDICTS = {
    "running": "The run goes on: round {round} of {rounds}.",
    "void": "The result is void, and the run accepted it: {why}.",
    "constant": "The shared adapter has learned nothing yet: it answers {only} for every row.",
    "nothing": "Nothing was measured: there are no held-out rows.",
    "gain": "Joining pays: own models are right on {own:.1f} % of the held-out rows, models "
    "trained alone on {alone:.1f} % ({gain}).",
    "loss": "Joining does not pay: own models are right on {own:.1f} % of the held-out rows, "
    "models trained alone on {alone:.1f} % ({gain}).",
    "unclear": "Joining makes no difference that these rows can show: own models are right on "
    "{own:.1f} % of them, models trained alone on {alone:.1f} % ({gain}).",
    "shared": "The shared adapter is right on {score:.1f} % of the held-out rows; always answering "
    "the most frequent class would be right on {majority:.1f} %.",
}
"""The sentences with which a run's page opens, one of them."""


def write(directory: Path) -> Path:
    """Write ``report.html`` into the directory of a run, of a sweep or of an audit.

    Raises:
        InputError: If the directory holds none of them.
    """
    if (directory / results.MANIFEST).exists():
        page = render("sweep.html", of_sweep(directory))
    elif (directory / findings.FILE).exists():
        page = render("audit.html", of_audit(directory))
    else:
        page = render("run.html", of_run(directory))
    path = directory / FILE
    write_atomic(path, page)
    return path


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """Fill a template of ``experiments/templates``; all text is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(version=fedlora.__version__, **values).encode()


@contextlib.contextmanager
def live(directory: Path) -> Generator[None]:
    """Rewrite the page of a run as its rounds are recorded, until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        seen = None
        while not ended.wait(LIVE_SECONDS):
            with contextlib.suppress(Exception):  # a page that fails must not end the run
                now = (directory / ROUNDS).stat().st_mtime_ns
                if now != seen and not (directory / RESULT).exists():
                    write(directory)
                    seen = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def of_run(directory: Path) -> dict[str, Any]:
    """The content of the page on a run, also on one in progress.

    Raises:
        InputError: If the directory holds no run.
    """
    if not (directory / CONFIG).exists():
        raise InputError(f"{directory} holds no run, sweep or audit; give the directory of one")
    config, records = load(directory / CONFIG), read_records(directory)
    complete = (directory / RESULT).exists()
    result: Mapping[str, Any] = read_run_file(directory) if complete else {}
    privacy: Mapping[str, Any] = read_run_file(directory, PRIVACY) if complete else {}
    joining = joining_verdict.comparison(result)
    kind, verdict = _verdict(config, result, joining, len(records))
    return {
        "title": f"Federated run: {directory.absolute().name}",
        "refresh": 0 if complete else round(LIVE_SECONDS),
        "kind": kind,
        "verdict": verdict,
        "about": _about(config, result, privacy),
        "models": [] if joining is None else [(m, joining[m]["accuracy"]) for m in MODELS],
        "joining": joining,
        "promise": _promise(config, privacy) if complete else [],
        "bad_promise": config.privacy.protects_nobody,
        "identity": _identity(config, result, privacy) if complete else [],
        "warnings": [f["text"] for f in result.get("findings", []) if not f["voids"]],
        "rounds": [
            {
                "round": line["round"],
                "accuracy": line["metrics"].get("accuracy"),
                "epsilon": line["epsilon_max"],
                "updates": f"{line['updates']} of {line['asked']}",
                "seconds": line["seconds"],
                "rejected": line["aggregation"].get("rejected", {}),
            }
            for line in records
        ],
        "institutions": _institutions(result, privacy),
        "classes": [
            [label, count["truth"], count["predicted"], count["correct"]]
            for label, count in result.get("per_class", {}).items()
        ],
        "cost": f"{duration(sum(line['seconds'] for line in records))} of rounds, "
        f"{results.bytes_moved(records) / 1e6:.1f} MB of adapters",
        "environment": _environment(read_run_file(directory, ENVIRONMENT)),
        "configuration": config.to_toml(),
    }


def _verdict(
    config: RunConfig,
    result: Mapping[str, Any],
    joining: Mapping[str, Any] | None,
    rounds: int,
) -> tuple[str, str]:
    """Which of `VERDICTS` holds, and its text."""
    name, value = results.score(result)
    classes = metrics.classes_of(result)
    kind, values = "nothing", dict[str, Any]()
    if not result:
        kind, values = "running", {"round": rounds, "rounds": config.federation.rounds}
    elif because := void(result):
        kind, values = "void", {"why": "; ".join(because)}
    elif (only := metrics.only_prediction(classes)) is not None:
        kind, values = "constant", {"only": only}
    elif joining is not None:
        kind = joining_verdict.outcome(joining).value
        values = {m: 100 * joining[m]["accuracy"] for m in MODELS}
        values["gain"] = joining_verdict.interval(joining["gain"])
    elif name:
        share = metrics.majority(classes)[1] if classes else 0.0
        kind, values = "shared", {"score": 100 * value, "majority": 100 * share}
    return kind, VERDICTS[kind].format(**values)


def _about(config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    """Who taught what, how and when, in a line."""
    ended = privacy.get("run", {}).get("finished", "")[:10]
    return (
        f"A {'deployment' if config.deployed else 'simulation'}{', ended ' * bool(ended)}{ended}: "
        f"{result.get('population', config.data.institutions)} institutions, "
        f"{config.federation.rounds} rounds, {config.adapter.method} of rank "
        f"{config.adapter.rank} on {config.model.name}, strategy {config.federation.strategy}."
    )


def _promise(config: RunConfig, privacy: Mapping[str, Any]) -> list[str]:
    """What is promised to whom."""
    said = [privacy["protects"]]
    if not config.privacy.promises:
        return said
    epsilon = largest_epsilon(privacy)
    said.append(
        f"Epsilon {at_most(epsilon)} at most, per {config.privacy.unit}. Adversary: "
        f"{privacy['adversary']}."
    )
    if trusted := privacy.get("secure_aggregation"):
        alone = epsilon_alone(privacy)
        said.append(
            f"{trusted['honest']} honest institutions must be in every sum, of "
            f"{trusted['institutions']}; if all others collude, epsilon is "
            f"{at_most(float('inf' if alone is None else alone))}."
        )
    if most := with_earlier_runs(config, privacy):
        said.append(
            f"With earlier runs on the same ledger: epsilon {at_most(most['ledger_epsilon'])} at "
            f"delta {most['ledger_delta']:g}, of {most['ledger_limit']:g} that its institution "
            "allows."
        )
    if found := privacy.get("odds"):
        for prior, after in sorted(found["suspicion"].items(), reverse=True):
            said.append(
                f"A suspicion of {100 * float(prior):g} % that a certain {config.privacy.unit} was "
                f"trained on can rise to {100 * after:.4g} % at most."
            )
        if config.adapter.start:
            said.append("What the start adapter reveals of the same records is not in these odds.")
    if config.privacy.unit == "record":
        said.append(
            f"A customer with two records has twice the epsilon, {at_most(2 * epsilon)}; the key "
            "privacy.unit protects customers as a whole."
        )
    return said


def _identity(
    config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]
) -> list[tuple[str, str]]:
    base = result["base"]
    return [
        ("run", str(result["run"])),
        ("ended", str(privacy.get("run", {}).get("finished", ""))),
        ("base model", f"{base['name']}, {base['dtype']}, SHA-256 {base['digest']}"),
        ("records", f"{config.data.source}, partitioned by {config.data.partition}"),
        ("trust", config.privacy.trust),
        ("seal of privacy.json", str(privacy.get("seal", {}).get("sha256", ""))),
        ("check it with", "fedlora verify RUN_DIRECTORY"),
    ]


def _institutions(result: Mapping[str, Any], privacy: Mapping[str, Any]) -> list[dict[str, str]]:
    accuracies = result.get("institutions", {})
    spent: Mapping[str, Mapping[str, Any]] = privacy.get("institutions", {})
    joining = result.get("joining", {}).get("institutions", {})
    names = sorted({*accuracies, *spent, *joining})
    return [
        {
            "name": name,
            "shared": _percent(accuracies.get(name)),
            "alone": _percent(joining.get(name, {}).get("alone")),
            "own": _percent(joining.get(name, {}).get("own")),
            "epsilon": at_most(float(spent[name]["epsilon"]))
            if "epsilon" in spent.get(name, {})
            else "",
        }
        for name in names
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _environment(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    dirty = " with changes that are not committed" if found.get("git_dirty") else ""
    return [
        ("command", " ".join(found["command"])),
        ("commit", f"{found['git_sha'] or 'unknown'}{dirty}"),
        ("machine", f"{found['platform']}, {found['cores']} cores, {found['processor']}"),
        ("GPUs", ", ".join(found["gpus"]) or "none"),
        ("Python", str(found["python"])),
        *((name, str(version)) for name, version in found["versions"].items()),
    ]


def of_sweep(directory: Path) -> dict[str, Any]:
    """The content of the page on a sweep."""
    sweep = results.read(directory)
    lines = results.summary(sweep)
    pooled, each = results.tables(lines, sweep.axes)
    shown = [line for line in lines if line["institution"] == results.ALL and not line["same_as"]]
    return {
        "title": f"Sweep: {sweep.about['name']}",
        "command": sweep.about["command"],
        "missing": sweep.missing,
        "cases": len(sweep.about["cases"]),
        "caption": results.CAPTION,
        "bars": [
            {
                "name": " ".join(
                    [line["arm"], *(results.text_of(line[axis]) for axis in sweep.axes)]
                ),
                "value": line["accuracy"],
                "half": line["accuracy_ci95"] or 0.0,
            }
            for line in shown
            if line["accuracy"] is not None
        ],
        "pooled": pooled,
        "each": each,
    }


def of_audit(directory: Path) -> dict[str, Any]:
    """The content of the page on an audit."""
    found = findings.read(directory)
    *rows, _ = findings.facts(found)
    return {
        "title": f"Privacy audit: {directory.absolute().name}",
        "kind": "loss" if found["refuted"] else "gain" if findings.can_refute(found) else "unclear",
        "verdict": f"The promise {findings.verdict(found)}.",
        "promised": at_most(float(found["epsilon"])),
        "shown": at_least(found["shown"]["epsilon"], 3),
        "rows": rows,
        "protects": found["protects"],
    }

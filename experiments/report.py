"""`fedlora report`: one page on a run, a sweep or an audit, for readers who are no researchers.

Reads the directory only: no model, no records, no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import figures, joining_page, opening, results, sweep_page
from experiments.audit import findings
from experiments.audit import page as audit_page
from experiments.pages import Page, Section, Table, environment, number, render
from fedlora.config.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models import metrics
from fedlora.rounding import at_most, duration
from fedlora.runs import joining_verdict
from fedlora.runs.run_files import CONFIG, ENVIRONMENT, PRIVACY, read_records, read_run_file
from server.privacy_statement import with_earlier_runs
from simulation.progress import lost_rounds, skipped_rounds

FILE = "report.html"
MAX_BARS = 40
METRICS = (
    "Accuracy is the share of correct answers on held-out rows, which no institution trained on. "
    "Macro-F1 weights every class equally, rare classes included."
)


def write(directory: Path) -> Path:
    """Write ``report.html`` into the directory of a complete run, of a sweep or of an audit.

    Raises:
        InputError: If the directory holds none of them.
    """
    if (directory / results.MANIFEST).exists():
        page = sweep_page.of(directory)
    elif (directory / findings.FILE).exists():
        page = audit_page.of(directory)
    elif (directory / "run" / CONFIG).exists() and not (directory / CONFIG).exists():
        raise InputError(
            f"{directory} holds no {findings.FILE}: if it is of an audit, that did not finish; "
            f"start it anew with another --out, or give {directory / 'run'} for its run"
        )
    else:
        page = of_run(directory)
    path = directory / FILE
    write_atomic(path, render(page))
    return path


def of_run(directory: Path) -> Page:
    """Make the page on one run."""
    run = opening.Run(
        directory=directory,
        result=read_run_file(directory),
        privacy=read_run_file(directory, PRIVACY),
        config=load(directory / CONFIG),
        records=read_records(directory),
    )
    config, result = run.config, run.result
    return Page(
        title=f"Federated run: {directory.absolute().name}",
        about=opening.about(run),
        opening=opening.sections(run),
        tiles=_tiles(run),
        sections=[
            _findings(result),
            Section(title="What was done", words=_words(run)),
            Section(title="Privacy in figures", **_privacy(config, run.privacy)),
            *joining_page.section(result, config),
            Section(title="Quality", words=[METRICS], **_quality(result, run.records)),
            Section(title="Institutions", **_by_institution(result)),
            Section(title="Aggregation", **_aggregation(run.records)),
            Section(title="Cost", **_cost(run)),
            environment(read_run_file(directory, ENVIRONMENT)),
            Section(title="Configuration", text=config.to_toml()),
        ],
    )


def _tiles(run: opening.Run) -> dict[str, str]:
    result, tiles = run.result, dict[str, str]()
    joining = joining_verdict.comparison(result)
    name, value = results.score(result)
    if joining is not None:
        tiles["gain of joining, points"] = f"{100 * joining['gain']['mean']:+.1f}"
    elif name:
        tiles[name.replace("_", " ")] = f"{100 * value:.1f} %"
    if classes := metrics.classes_of(result):
        tiles["always the most frequent class"] = f"{100 * metrics.majority(classes)[1]:.1f} %"
    if "token_loss" in result:
        loss = result["token_loss"]
        tiles["loss per token"] = f"{loss:.3f}" if isinstance(loss, float) else "not finite"
    of_run = "largest epsilon (smaller is more private)"
    if run.config.privacy.noise == "seeded":
        of_run = "epsilon, were the noise secret"
    if (most := with_earlier_runs(run.config, run.privacy)) is not None:
        tiles["largest epsilon, all runs on the records"] = _epsilon(most["ledger_epsilon"])
        of_run = "of this run alone"
    if level := run.privacy.get("institution_level"):
        tiles["epsilon of an institution as a whole"] = _epsilon(level["epsilon"])
    return tiles | {
        of_run: _epsilon(result["epsilon_max"]),
        "institutions": str(len(run.institutions)),
        **({"held-out rows": f"{run.held_out:,}"} if run.held_out else {}),
        "rounds": str(result["rounds"]),
    }


def _words(run: opening.Run) -> list[str]:
    """Describe the run in words."""
    config, result = run.config, run.result
    adapter, training, counts = config.adapter, config.training, result["counts"]
    moved = ""
    if config.deployed:
        moved = "No record left an institution: institutions and server exchanged adapters. "
    did = (
        f"{opening.task(run)} The model itself did not "
        f"change; the run trained an adapter for it ({adapter.method}, rank {adapter.rank}, "
        f"{result['trained_parameters']:,} parameters). {moved}"
    )
    if not config.federation.rounds:
        did = f"Nothing was trained: these are the results of {config.model.name} before training. "
    share = (
        f"{100 * training.sample_rate:g} % of its records"
        if training.sample_rate
        else f"{training.batch_size} of its records"
    )
    counted = result["rounds"] - skipped_rounds(run.records)
    only = f" of {counted} round{'s' * (counted != 1)}" if counted < result["rounds"] else ""
    how = (
        f"In {'each of ' * (result['rounds'] != 1)}{result['rounds']} "
        f"round{'s' * (result['rounds'] != 1)} every sampled institution took "
        f"{training.local_steps} step{'s' * (training.local_steps != 1)} on about {share}, and the "
        f"server combined the updates{only} ({config.federation.strategy}, "
        f"server optimizer {config.federation.server_optimizer})."
    )
    if lost := lost_rounds(config, result, run.records):
        how += f" {lost}"
    rows = [f"{counts[k]:,} {w}" for k, w in (("train", "to train on"), ("held_out", "held out"))
            if k in counts]  # fmt: skip
    data = f"The records came from {config.data.source}, partitioned by {config.data.partition}"
    data += f": {' and '.join(rows)}." if rows else "."
    return [did, how, data] if config.federation.rounds else [did, data]


def _findings(result: Mapping[str, Any]) -> Section:
    """The run's warnings; empty without any."""
    found = [finding["text"] for finding in result.get("findings", []) if not finding["voids"]]
    return Section(title="Warnings", points=[f"{text}." for text in found])


def _privacy(config: RunConfig, privacy: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    words: list[str] = []
    if config.privacy.enabled:
        words = [
            f"Adversary: {privacy['adversary']}.",
            "Adjacency, the difference between two data sets that an adversary cannot tell apart: "
            f"{privacy['adjacency']}.",
            "Epsilon bounds what an adversary can learn about one protected unit: the odds that "
            "the adversary gives to its presence change by at most the factor e^epsilon, except in "
            "a few cases (above). These are rare, but not as rare as delta.",
        ]
    shared = "secure_aggregation" in privacy
    heads = ["institution", "unit", "epsilon", "delta", "noise", "noise multiplier"]
    heads += ["sample rate", "steps", *(["epsilon if all others collude"] * shared)]
    rows = [
        [
            name,
            str(said.get("unit", config.privacy.unit)),
            _epsilon(said["epsilon"]),
            f"{said['delta']:g}",
            str(said.get("noise", config.privacy.noise)),
            number(said["noise_multiplier"]),
            f"{said['sample_rate']:.4g}",
            str(said["steps"]),
            *([_epsilon(said["epsilon_alone"])] if shared else []),
        ]
        for name, said in [
            *privacy["institutions"].items(),
            *(
                [("(each institution as a whole)", privacy["institution_level"])]
                if "institution_level" in privacy
                else []
            ),
        ]
    ]
    if len(rows) > 1 and len({tuple(row[1:]) for row in rows}) == 1:
        rows = [[f"each of the {len(rows)}", *rows[0][1:]]]
    if rows:
        table = Table(rows=[heads, *rows], title="Largest budget spent by each institution",
                      folded=len(rows) > 12)  # fmt: skip
        found["tables"] = [table]
    silent = privacy.get("without_report", {})
    if silent:
        words.append(
            "Institutions without a report, counted as having spent everything: "
            + ", ".join(silent)
            + "."
        )
    return {**found, "words": words}


def _epsilon(value: float | str) -> str:
    return at_most(float(value))


def _quality(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown: dict[str, str] = {}
    measured = [{"round": r["round"], **r["metrics"]} for r in records]
    named = {"accuracy": "accuracy", "macro_f1": "macro-F1", "exact_match": "exact"}
    lines = {of: points for key, of in named.items() if (points := figures.last_of(measured, key))}
    if lines:
        epsilons = figures.last_of(records, "epsilon_max")
        title = "Quality on held-out rows by round" + ", and the epsilon spent" * bool(epsilons)
        shown[title] = figures.by_round(
            "quality",
            title,
            lines,
            label="share of held-out rows",
            epsilons=epsilons,
            shares=True,
        )
    tables: list[Table] = []
    if classes := result.get("per_class"):
        rows = [["class", "rows", "predicted", "right", "found, %"]]
        for label, counts in classes.items():
            found = f"{100 * counts['correct'] / counts['truth']:.1f}" if counts["truth"] else ""
            rows.append(
                [
                    label,
                    *(str(counts[k]) for k in ("truth", "predicted", "correct")),
                    found,
                ]
            )
        tables = [Table(rows=rows, title="By class", folded=len(rows) > 12)]
    return {"figures": shown, "tables": tables}


def _by_institution(result: Mapping[str, Any]) -> dict[str, Any]:
    accuracies: dict[str, float] = result["institutions"]
    if len(accuracies) < 2:
        return {}
    order = dict(sorted(accuracies.items(), key=lambda item: item[1]))
    worst = next(iter(order))
    shown = dict(list(order.items())[:MAX_BARS])
    title = "Accuracy on each institution's held-out rows"
    if len(shown) < len(order):
        title += f", the {MAX_BARS} lowest"
    rows = [["institution", "accuracy, %"], *([n, f"{100 * a:.1f}"] for n, a in order.items())]
    return {
        "words": [f"The lowest accuracy is {100 * order[worst]:.1f} %, at {worst}."],
        "figures": {
            title: figures.bars(
                "institutions", title, {"accuracy": shown}, label="accuracy", worst=worst
            )
        },
        "tables": [Table(rows=rows, title="As a table", folded=True)],
    }


def _aggregation(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Show the updates that did not count."""
    unused: dict[tuple[str, str], list[int]] = {}  # institution, reason -> rounds
    for r in records:
        for name, why in r["aggregation"].get("rejected", {}).items():
            unused.setdefault((name, why), []).append(r["round"])
    rows = [[*key, *map(str, (len(of), of[0], of[-1]))] for key, of in sorted(unused.items())]
    heads = ["institution", "reason", "updates", "first round", "last round"]
    tables = [Table(rows=[heads, *rows], title="Unused updates", folded=len(rows) > 12)]
    return {"tables": tables if rows else []}


def _cost(run: opening.Run) -> dict[str, Any]:
    result, records = run.result, run.records
    if not records:
        return {}
    moved = {
        of: {r["round"]: sum(i[key] for i in r["institutions"].values()) / 1e6 for r in records}
        for of, key in (("to institutions", "sent"), ("from institutions", "received"))
    }
    one, two = "Seconds by round", "Megabytes by round"
    total = results.bytes_moved(records) / 1e6
    per = total / max(1, len(run.institutions))
    return {
        "words": [
            f"The rounds took {duration(result['seconds'])} and moved {total:.1f} MB, {per:.2f} MB "
            "for each institution."
            + " A simulation uses no network: these are the adapters' sizes."
            * (not run.config.deployed)
        ],
        "figures": {
            one: figures.by_round(
                "seconds",
                one,
                {"seconds": {r["round"]: r["seconds"] for r in records}},
                label="seconds",
                from_zero=True,
            ),
            two: figures.by_round("bytes", two, moved, label="MB", from_zero=True),
        },
    }

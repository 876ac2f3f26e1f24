"""The first page of a run's report: the verdict, the promise as odds, the trust that it needs.

It is written for a risk officer, who reads nothing else, and fits on one sheet of paper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import joining_page, results
from experiments.audit import findings as audit_findings
from experiments.pages import Section, Table
from fedlora.config.config import RunConfig
from fedlora.models import metrics
from fedlora.privacy.odds import group_delta
from fedlora.rounding import at_least, at_most
from fedlora.runs import joining_verdict
from fedlora.runs.joining_verdict import MODELS, Outcome
from fedlora.runs.run_files import CONFIG, RESULT, ledger_alone, said_of_origins, void
from server.privacy_statement import epsilon_alone, largest_epsilon, with_earlier_runs
from server.trend import advice
from simulation.progress import lost_rounds


@dataclass(frozen=True, kw_only=True)
class Run:
    """A complete run as its report reads it.

    Args:
        directory: The run's directory.
        config: Its configuration.
        result: The content of result.json.
        privacy: The content of privacy.json.
        records: The lines of rounds.jsonl.
    """

    directory: Path
    config: RunConfig
    result: Mapping[str, Any]
    privacy: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def held_out(self) -> int:
        """The number of held-out rows; 0 where there are none or the result does not say."""
        return int(self.result.get("n", 0))

    @property
    def judged(self) -> int:
        """The number of held-out rows whose answers were judged: under sft a part of them."""
        return int(self.result.get("generated", self.held_out))

    @property
    def institutions(self) -> set[str]:
        """All institutions that were asked or measured."""
        asked = {name for record in self.records for name in record["institutions"]}
        return asked | set(self.result["institutions"])

    @property
    def population(self) -> int:
        """The number of institutions in the run, asked or not."""
        return int(self.result.get("population", len(self.institutions)))


def about(run: Run) -> str:
    """The run in a line: who taught what, how and when."""
    bound = run.privacy.get("run", {})
    when = f", ended {bound['finished'][:10]}" if "finished" in bound else ""
    return f"A {'deployment' if run.config.deployed else 'simulation'}{when}. {task(run)}"


def task(run: Run) -> str:
    """Who taught what, as a sentence."""
    config, many = run.config, run.population
    goal = (
        f"to sort texts into {len(run.result['labels'])} classes"
        if config.model.task == "classification"
        else "to answer as its examples do"
    )
    if not config.federation.rounds:
        return f"Nothing was trained: these are the results of {config.model.name} as it is."
    who = {
        "all": f"{many} institution{'s' * (many != 1)} together taught",
        "pooled": "All institutions' records were pooled, which banks may not do, to teach",
    }.get(config.data.view, f"{config.data.view.removeprefix('only:')} alone taught")
    return f"{who} the language model {config.model.name} {goal}."


def sections(run: Run) -> list[Section]:
    """The sections of the first page, in order."""
    return [verdict(run), promised(run), trusted(run), uncovered(run), identity(run)]


def verdict(run: Run) -> Section:
    """Whether the result is of use, in words, and the three models of joining."""
    result, joining = run.result, joining_verdict.comparison(run.result)
    because = void(result)
    classes = metrics.classes_of(result)
    learned = "" if (only := metrics.only_prediction(classes)) is None else (
        f"The shared adapter has learned nothing yet: it answers {only} for every row."
    )  # fmt: skip
    shown = Outcome.LOSS if because or learned else Outcome.GAIN
    if because:
        note = f"The result is void, and the run accepted it: {'; '.join(because)}."
    elif learned:
        note = learned
    elif joining is not None:
        note, shown = joining_verdict.verdict(joining), joining_verdict.overall(joining)
    else:
        note, shown = _alone(run, classes)
    words: list[str] = []
    if joining is not None and (because or learned):
        words.append(joining_verdict.verdict(joining))
    if because and learned:
        words.append(learned)
    notes: list[str] = []
    warnings = [finding for finding in result.get("findings", []) if not finding["voids"]]
    if warnings:
        many = "is 1 warning" if len(warnings) == 1 else f"are {len(warnings)} warnings"
        notes.append(f"There {many}: see Warnings, below.")
    notes.append(lost_rounds(run.config, result, run.records))
    if joining is not None:
        compared = joining_verdict.compared(joining, run.population)
        notes += [compared, joining_verdict.one_run(joining)]
    if missing := result.get("not_evaluated"):
        said = joining_verdict.with_codes(missing)
        notes.append(f"Not measured, because the reply was refused: {said}.")
    if said := " ".join(filter(None, notes)):
        words.append(said)
    if rising := result.get("still_rising"):
        words.append(advice(rising))
    return Section(
        title="Verdict",
        note=note,
        bad=shown is Outcome.LOSS,
        caution=shown is Outcome.UNCLEAR,
        words=words,
        tables=[] if joining is None else [_three(joining)],
    )


def _alone(run: Run, classes: Mapping[str, Mapping[str, int]]) -> tuple[str, Outcome]:
    """The verdict of a run without models at home.

    It is a loss where the adapter is of no use, and unclear where nothing shows that it is of use.
    """
    name, value = results.score(run.result)
    if not name:
        return "Nothing was measured: there are no held-out rows.", Outcome.UNCLEAR
    shown = Outcome.GAIN
    who = "The shared adapter" if run.config.federation.rounds else run.config.model.name
    said = f"{who} is right on {100 * value:.1f} % of {run.judged:,} held-out rows"
    if classes:
        frequent, share = metrics.majority(classes)
        said += f"; always answering {frequent} would be right on {100 * share:.1f} %"
        if value <= share:
            least = metrics.majority_macro_f1(classes)
            useless = metrics.occurring(classes) > 1 and run.result["macro_f1"] <= least
            shown = Outcome.LOSS if useless else Outcome.UNCLEAR
            said += "" if useless else ", which its accuracy does not beat"
    if shown is Outcome.LOSS:
        said = f"{who} is of no use yet. {said}"
    if run.config.data.view != "all":
        return f"{said}. This run has no federation, so it does not measure joining.", shown
    if "joining" in run.result:
        failed = shown if shown is Outcome.LOSS else Outcome.UNCLEAR
        return f"{said}. Whether joining pays is not known: no institution was compared.", failed
    why = "no institution trained a model alone"
    return f"{said}. Whether joining pays was not measured: {why}.", shown


def _three(joining: Mapping[str, Any]) -> Table:
    def row(name: str, key: str) -> list[str]:
        return [name, *(f"{100 * joining[model][key]:.1f}" for model in MODELS)]

    heads = ["on held-out rows, %", "alone, at the institution", "shared, the federation's"]
    return Table(
        rows=[
            [*heads, "own, made at home with it"],
            row("accuracy", "accuracy"),
            row("macro-F1", "macro_f1"),
        ]
    )


def promised(run: Run) -> Section:
    """What epsilon and delta allow an attacker, and the ledgers' limit and remainder."""
    privacy, config = run.privacy, run.config
    points: list[str] = []
    spent = privacy["institutions"].values()
    delta = run.result["delta"]
    if config.privacy.promises and not delta and (silent := len(privacy.get("without_report", {}))):
        points.append(
            f"Epsilon {at_most(largest_epsilon(privacy))} at most, for whether a certain "
            f"{_unit(config.privacy.unit)} was trained on. Delta goes by size class, and is not "
            f"known of {silent} institution{'s' * (silent != 1)} without a report; so there are no "
            "odds."
        )
    elif config.privacy.promises and delta:
        epsilon, delta = largest_epsilon(privacy), float(delta)
        what = f"a certain {_unit(config.privacy.unit)} was trained on"
        if "odds" in privacy:
            continued = bool(config.adapter.start or run.result.get("origins"))
            points += odds(privacy["odds"], epsilon, delta, what, continued=continued)
        else:
            points.append(
                f"Epsilon {at_most(epsilon)} at delta {at_most(delta, 3)} at most, for whether "
                f"{what}; odds are not computed where not every institution's spending is stated."
            )
        if (most := with_earlier_runs(config, privacy)) is not None:
            epsilon = most["ledger_epsilon"]
            delta = max(one["ledger_delta"] for one in spent)
            points.append(
                f"All runs that the ledgers of these records were charged for together: epsilon "
                f"{at_most(epsilon)} at delta {at_most(delta, 3)}. What follows is for these; a "
                "run without differential privacy is in no ledger."
            )
            if (alone := ledger_alone(privacy)) is not None:
                points.append(
                    "Some of these runs have secure aggregation. If all others collude in them, it "
                    f"is epsilon {at_most(alone)}."
                )
        shared = config.privacy.shares_noise
        if config.privacy.unit == "record":
            where = "at one or several institutions" if shared else "at an institution"
            points.append(customer(epsilon, delta, where))
        elif shared:
            points.append(customer_of_two(epsilon, delta))
    if "odds" in (level := privacy.get("institution_level", {})):
        what = "the updates of a certain institution counted, and not zeros in their place"
        found = odds(level["odds"], level["epsilon"], level["delta"], what)
        points += [f"Institutions as a whole, from those who see global adapters: {found[0]}"]
    points += ledgers(run)
    return Section(
        title="What was promised",
        note=privacy["protects"],
        bad=config.privacy.protects_nobody,
        points=points,
    )


def customer_of_two(epsilon: float, delta: float) -> str:
    """What a promise for customers under secure aggregation says of one of two institutions."""
    return (
        "The promise is for a customer of one institution. Records at two institutions move one "
        f"sum, so that it promises a customer of both {_of_two(epsilon, delta) or 'nothing'}."
    )


def _of_two(epsilon: float, delta: float) -> str:
    """The promise for two of what is promised one; empty where nothing is."""
    both = group_delta(epsilon, delta, 2)
    return f"epsilon {at_most(2 * epsilon)} at delta {at_most(both, 2)}" if both < 1 else ""


def customer(epsilon: float, delta: float, where: str) -> str:
    """What a promise for one record says of a customer with several.

    Args:
        epsilon: Of one record.
        delta: Of one record.
        where: Where the several records are.
    """
    said = "The promise is for one record. "
    if of_two := _of_two(epsilon, delta):
        said += f"For a customer with two records {where} it is {of_two}, and "
        # delta (e^(k epsilon) - 1) / (e^epsilon - 1) is below 1; the sum decides at the edge
        most = max(2, round(math.log1p(math.expm1(epsilon) / delta) / epsilon))
        while group_delta(epsilon, delta, most) >= 1:
            most -= 1
        while group_delta(epsilon, delta, most + 1) < 1:
            most += 1
        said += f"for one with {most + 1} or more it promises nothing"
    else:
        said += f"For a customer with two or more records {where} it promises nothing"
    return f"{said}. The key privacy.unit protects customers as a whole."


def _unit(unit: str) -> str:
    return "record" if unit == "record" else f"{unit} (with all records)"


def odds(
    found: Mapping[str, Any], epsilon: float, delta: float, what: str, *, continued: bool = False
) -> list[str]:
    """The odds of privacy.json (`fedlora.privacy.odds`) as sentences.

    Args:
        found: ``odds`` of privacy.json.
        epsilon: The largest epsilon of an institution.
        delta: The largest delta of one.
        what: What an attacker suspects.
        continued: Whether the run started from an earlier adapter, which these odds do not cover.
    """
    released = "Everything that the run released"
    if continued:
        released = (
            "This is the run by itself: what it started from reveals of the same "
            "records is not in these odds. Everything that its own rounds released"
        )
    before = [f"from {percent(float(prior))} to at most {percent(after, up=True)}"
              for prior, after in sorted(found["suspicion"].items(), reverse=True)]  # fmt: skip
    (rate, share), *rarer = sorted(found["found"].items(), reverse=True)
    return [
        f"Epsilon {at_most(epsilon)} at delta {at_most(delta, 3)}. Somebody suspects that {what}. "
        f"{released} can raise this suspicion {', and '.join(before)}"
        + (
            f", except in at most 1 of {int(1 / rest):,} cases"
            if (rest := found["exceeded"])
            else ""
        )
        + ".",
        "The noise of this run allows less. An attacker who wrongly accuses "
        f"{percent(float(rate))} of those not trained on finds at most {percent(share, up=True)} "
        "of those trained on"
        + "".join(
            f"; at {percent(float(other))} wrongly accused, at most {percent(most, up=True)}"
            for other, most in rarer
        )
        + ". Where half of those in question were trained on, no attacker is right about more than "
        f"{percent(found['right'], up=True)} of them; guessing is right about 50 %.",
        "These are bounds for the worst case: the attacker knows everything but this one, and has "
        "seen all that was sent in any round.",
    ]


def percent(share: float, *, up: bool = False) -> str:
    """A share as percent with three digits, or more near 100 %.

    Args:
        share: In [0, 1].
        up: Whether to round up, as for a bound.
    """
    digits = 2 if share > 0.995 else 1 if share >= 0.02 else 2
    scale = 10**digits
    value = 100 * share
    # A bound must not be understated; 1e-9 absorbs the rounding of an exact figure.
    shown = -(-(value * scale - 1e-9) // 1) / scale if up else round(value, digits)
    return f"{shown:.{digits}f}".rstrip("0").rstrip(".") + " %"


def ledgers(run: Run) -> list[str]:
    """The ledgers' limit, and the least that is left of one; empty without ledgers."""
    spent = run.privacy["institutions"]
    if not spent:
        return []
    name, worst = min(
        spent.items(), key=lambda item: item[1]["ledger_limit"] - item[1]["ledger_epsilon"]
    )
    left = max(0.0, worst["ledger_limit"] - worst["ledger_epsilon"])
    said = (
        "Each institution's ledger adds up all runs charged to it and refuses what exceeds its "
        f"limit. The least is left at {name}: epsilon {at_least(left)} of "
        f"{worst['ledger_limit']:g}, at delta {at_most(worst['ledger_delta'], 3)}."
    )
    if not run.config.deployed and not run.config.privacy.ledger:
        said += " This simulation began new ledgers: earlier runs on these records do not count."
    return [said]


def trusted(run: Run) -> Section:
    """Who must be trusted for the promise to hold."""
    privacy, config = run.config.privacy, run.config
    points: list[str] = []
    if not config.deployed:
        points.append(
            "This was a simulation: one file and one machine held the records of all institutions. "
            "Whoever ran it could see every record; the promise is about what its outputs reveal. "
            "Like a deployment, it passed on adapters only."
        )
    if privacy.protects_nobody:
        points.append(
            "Nobody is kept out: whoever sees the adapters of this run may learn from them about "
            "single training records. All of them must be trusted with the records themselves."
        )
        return Section(title="Who must be trusted", points=points)
    if privacy.shares_noise:
        points += _secure_aggregation(run.privacy)
    elif privacy.enabled:
        points.append(
            "For records, nobody else: in this run each institution adds all of its noise before "
            "anything leaves it, so neither the server nor all other institutions together learn "
            "more."
        )
    if privacy.hides_institutions:
        points.append(
            "For hiding an institution as a whole: the server, which sees every update and adds "
            "this noise."
        )
    points += [
        "Each institution, for itself: its own machine and staff, and the fedlora that it "
        "installed.",
        "For the quality of the adapter, though not for privacy: the server and the institutions. "
        "One that trains wrongly on purpose can spoil the result or hide a wrong answer in it.",
    ]
    return Section(title="Who must be trusted", points=points)


def _secure_aggregation(privacy: Mapping[str, Any]) -> list[str]:
    said = privacy["secure_aggregation"]
    largest = float(epsilon_alone(privacy) or "inf")
    epsilon = f"epsilon {at_most(largest)}" if math.isfinite(largest) else "no finite epsilon"
    return [
        f"h = {said['honest']} honest institutions of {said['institutions']}: each adds a share of "
        "the noise, and the promise needs that many honest shares in every sum.",
        f"It holds although the server and up to t = {said['colluding']} institutions tell each "
        f"other all that they know. A round with fewer than {said['least_survivors']} institutions "
        "changes nothing.",
        f"If all others collude, an institution's own share is left, which promises {epsilon}.",
    ]


def uncovered(run: Run) -> Section:
    """What the promise does not cover, and what an audit found."""
    rows = f"{run.held_out:,} held-out rows" if run.held_out else "held-out rows"
    if run.judged < run.held_out:
        rows += f" (those of answers from {run.judged:,} of them)"
    points: list[str] = []
    if results.score(run.result)[0] or "token_loss" in run.result:
        points.append(
            f"All figures of quality, those of each class and institution too, come from {rows}, "
            "which nothing protects: no noise is added to them."
        )
    if "train" in run.result["counts"] and run.config.privacy.under_dp:
        points.append(
            "The numbers of training records in this report are exact, which the promise would not "
            "allow to release: keep the report where the records may be known."
        )
    if "joining" in run.result:
        points.append(joining_page.home_promise(run.config))
    if said := said_of_origins(run.result).replace("`", "").strip():
        points.append(said)
    points.append(
        "That an institution takes part, and the size class of its data, count as public."
    )
    points.append(audit_findings.of_run(run.directory))
    return Section(title="What the promise does not cover", points=points)


def identity(run: Run) -> Section:
    """What the report is about, so that a filed copy can be held against the run."""
    bound, seal = run.privacy.get("run"), run.privacy.get("seal", {})
    if bound is None:
        return Section(
            title="Identity",
            words=[
                "privacy.json is not bound to this run: an earlier version of fedlora wrote it."
            ],
        )
    commit = bound["commit"] or "unknown"
    dirty = " with changes that are not committed" if bound["uncommitted_changes"] else ""
    rows = [
        ["what", "which"],
        ["run", f"{bound['id']}, a {bound['mode']}, ended {bound['finished']}"],
        ["made by", f"fedlora {bound['fedlora']}, commit {commit}{dirty}"],
        ["base model", f"{bound['base']['name']}, SHA-256 {bound['base']['digest']}"],
        *(
            [name, f"SHA-256 {bound['files'][file]}"]
            for name, file in (
                ("adapter", "adapter/adapter_model.safetensors"),
                ("configuration", CONFIG),
                ("results", RESULT),
            )
            if file in bound["files"]
        ),
        ["statement", f"SHA-256 {seal.get('sha256', 'unknown')}, {_signed(seal)}"],
    ]
    return Section(
        title="Identity",
        words=[
            f'"fedlora verify DIRECTORY" (its name: {run.directory.absolute().name}) checks all of '
            "this and computes epsilon anew."
        ],
        tables=[Table(rows=rows)],
    )


def _signed(seal: Mapping[str, Any]) -> str:
    if "signature" in seal:
        return "signed by the server"
    return "not signed: only a deployment's server signs"

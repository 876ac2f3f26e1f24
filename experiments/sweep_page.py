"""The page on a sweep: the cost of privacy, and each institution's gain."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import conclusion, figures, joining_page, results
from experiments.conclusion import Lines, setting_of, under_dp
from experiments.pages import Page, Section, Table, environment
from experiments.results import ALL, EPSILON, Results
from fedlora.config.config import RunConfig
from fedlora.config.sections import PrivacyConfig
from fedlora.errors import InputError
from fedlora.rounding import at_most
from fedlora.runs.run_files import ENVIRONMENT, RESULT, commit, void

MAX_REASONS = 3
"""The most findings that the note on void runs names."""
Points = list[Mapping[str, Any]]

ARM_MEANINGS = {
    "base": "base: the model before any training",
    "local": "local: each institution trains alone on its own records",
    "local-dp": "local-dp: the same under differential privacy",
    "central": "central: all records in one place, which banks may not do",
    "central-dp": "central-dp: the same under differential privacy",
    "federated": "federated: together, records at their institutions, without differential privacy",
    "federated-dp": "federated-dp: together and under differential privacy",
}


def of(out: Path) -> Page:
    """Make the page on a sweep's complete cells.

    Raises:
        InputError: If no case is complete.
    """
    sweep = results.read(out)
    about, axes, lines = sweep.about, sweep.axes, results.summary(sweep)
    if not lines:
        raise InputError(
            f"no case of the sweep in {out} is complete; continue with `fedlora sweep ... --resume`"
        )
    pooled = [line for line in lines if line["institution"] == ALL]
    table, each = results.tables(lines, axes)
    configs = sweep.configs
    data_sets = _data_sets(axes, about, configs)
    seeds = sorted({case["seed"] for case in about["cases"]})
    arms = list(dict.fromkeys(case["arm"] for case in about["cases"]))
    generated = any(config.model.task == "sft" for config in configs.values())
    return Page(
        title=f"Sweep: {about['name']}",
        opening=[
            *_void(sweep),
            conclusion.of(pooled, axes, data_sets),
            _dp([config.privacy for config in configs.values()]),
            Section(
                title="What was compared",
                words=_words(
                    arms,
                    axes,
                    seeds,
                    sweep.missing,
                    generated=generated,
                    as_many_steps=_as_many_steps(about, configs),
                ),
            ),
        ],
        tiles={} if data_sets else _tiles(pooled),
        sections=[
            _joining(pooled, configs, about),
            Section(title="The cost of privacy", figures=_privacy(pooled, axes, data_sets)),
            Section(title="By setting", figures=_against(pooled, axes) or _settings(pooled, axes)),
            Section(title="Institutions", **({} if data_sets else _institutions(lines, axes))),
            Section(
                title="Results",
                words=[f"{results.caption(lines)} Click a head to sort."],
                tables=[
                    Table(rows=table),
                    *([Table(rows=each, title="By institution", folded=True)] if each[1:] else []),
                ],
            ),
            *_environment(list(sweep.cells.values())),
            Section(
                title="How to repeat it",
                text=f"{about['command']}\n\n{(out / 'sweep.toml').read_text(encoding='utf-8')}",
            ),
        ],
    )


def _void(sweep: Results) -> list[Section]:
    """A section that names void results, which count below like others; none without any."""
    counted = {cell for case in sweep.complete for cell in case["cells"].values()}
    found = {cell: because for cell in counted if (because := void(sweep.cells[cell][RESULT]))}
    if not found:
        return []
    reasons = sorted({text for because in found.values() for text in because})
    note = (
        f"The results of {len(found)} of this sweep's runs are void, which it accepted, and count "
        f"in all figures below: {'; '.join(reasons[:MAX_REASONS])}"
        + (f"; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else "")
        + "."
    )
    return [Section(title="Void runs", note=note, bad=True, words=[", ".join(sorted(found)) + "."])]


def _words(
    arms: Sequence[str],
    axes: Sequence[str],
    seeds: Sequence[int],
    missing: int,
    *,
    generated: bool,
    as_many_steps: bool,
) -> list[str]:
    """Describe the comparison; where answers are generated, arms answer other held-out rows."""
    varied = f" Varied: {', '.join(axes)}." if axes else ""
    many = f"{len(seeds)} seeds" if len(seeds) != 1 else "one seed, so there are no intervals"
    words = [
        f"Compared, at each setting,{'' if generated else ' on the same held-out rows,'} with the "
        f"same split{' and the same number of steps' if as_many_steps else ''}: "
        + "; ".join(ARM_MEANINGS[arm] for arm in arms)
        + f".{varied} Each case with {many}."
    ]
    if not as_many_steps:
        words.append("At one setting arms took different numbers of steps, by their own [set.ARM].")
    if missing:
        verb = "case is not complete and is" if missing == 1 else "cases are not complete and are"
        words.append(f"{missing} {verb} left out.")
    return words


def _tiles(lines: Lines) -> dict[str, str]:
    """Return a tile with the best result of each arm."""
    best: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        known = best.get(line["arm"])
        if line["accuracy"] is not None and (known is None or line["accuracy"] > known["accuracy"]):
            best[line["arm"]] = line
    tiles: dict[str, str] = {}
    for arm, line in best.items():
        budget = f", epsilon {at_most(line['epsilon'], 3)}" if under_dp(line) else ""
        several = len({other["accuracy"] for other in lines if other["arm"] == arm}) > 1
        tiles[f"{arm}{budget}{', best setting' * several}"] = f"{100 * line['accuracy']:.1f} %"
    return tiles


def _privacy(lines: Lines, axes: Sequence[str], data_sets: Sequence[str] = ()) -> dict[str, str]:
    """Draw accuracy against epsilon, with a line for each arm under DP and each setting of it.

    Settings with the same runs share one line. Levels of arms without DP are drawn, unless settings
    are of different data sets.
    """
    if EPSILON not in axes:
        return {}
    others = [axis for axis in axes if axis != EPSILON]
    settings: dict[tuple[str, str], Points] = {}
    free: dict[tuple[str, str], Mapping[str, Any]] = {}
    for line in lines:
        if line["accuracy"] is None:
            continue
        setting = (line["arm"], setting_of(line, others))
        if under_dp(line):
            settings.setdefault(setting, []).append(line)
        else:
            free[setting] = line
    own = {key: points for key, points in settings.items() if not all(p["same_as"] for p in points)}
    series = {
        _name(arm, setting_of(points[0], _telling(arm, others, settings, own))): points
        for (arm, _), points in own.items()
    }
    shown = list(series.items())[: figures.MAX_SERIES]
    drawn: list[figures.Line] = []
    for name, points in shown:
        arm, label = points[0]["arm"].removesuffix("-dp"), setting_of(points[0], others)
        ends = [free[arm, label]] if (arm, label) in free else []
        points = sorted(points, key=lambda p: float(p[EPSILON])) + ends
        drawn.append(_line(name, points, EPSILON))
    if not any(len(x) > 1 for _, x, _, _ in drawn):
        return {}
    levels: dict[str, float] = {}
    for arm in ("base", "local", "central"):
        found = {line["accuracy"] for (other, _), line in free.items() if other == arm}
        if found and not data_sets:
            levels[arm if len(found) == 1 else f"{arm} (best setting)"] = max(found)
    title = "Accuracy against the privacy budget" + _part(len(series))
    return {title: figures.against_epsilon(title, drawn, levels)}


def _line(name: str, points: Points, axis: str) -> figures.Line:
    accuracies, halves = ([p[key] for p in points] for key in ("accuracy", "accuracy_ci95"))
    return name, [float(p[axis]) for p in points], accuracies, halves


def _telling(
    arm: str,
    axes: Sequence[str],
    settings: Mapping[tuple[str, str], Points],
    own: Mapping[Any, Points],
) -> list[str]:
    """The axes that a label of this arm names: not those that change nothing in it."""

    def values(axis: str, lines: Mapping[Any, Points]) -> set[str]:
        return {str(points[0][axis]) for (of, _), points in lines.items() if of == arm}

    return [axis for axis in axes if len(values(axis, settings)) == 1 or len(values(axis, own)) > 1]


def _name(arm: str, label: str) -> str:
    return f"{arm}: {label}" if label else arm


def _against(lines: Lines, axes: Sequence[str]) -> dict[str, str]:
    """Draw accuracy against each other number with at least three values."""
    shown: dict[str, str] = {}
    for axis in axes:
        values = {line[axis] for line in lines}
        if axis == EPSILON or len(values) < 3 or not all(_is_number(v) for v in values):
            continue
        others = [other for other in axes if other != axis]
        series: dict[str, list[Mapping[str, Any]]] = {}
        for line in lines:
            if line["accuracy"] is not None:
                label = setting_of(line, [o for o in others if o != EPSILON or under_dp(line)])
                series.setdefault(_name(line["arm"], label), []).append(line)
        drawn = [
            _line(name, sorted(points, key=lambda p: p[axis]), axis)
            for name, points in list(series.items())[: figures.MAX_SERIES]
        ]
        title = f"Accuracy against {axis}{_part(len(series))}"
        shown[title] = figures.against("against-" + axis.replace(".", "-"), title, drawn, axis)
    return shown


def _part(settings: int) -> str:
    """Return the addition to a title when some settings are not drawn."""
    shown = figures.MAX_SERIES
    return f" (the first {shown} of {settings} settings)" if settings > shown else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _settings(lines: Lines, axes: Sequence[str]) -> dict[str, str]:
    """Draw bars for each setting, with a colour for each arm."""
    groups: dict[str, dict[str, float]] = {}
    errors: dict[tuple[str, str], float] = {}
    others = [axis for axis in axes if axis != EPSILON]
    for line in lines:
        if line["accuracy"] is None or line["same_as"]:
            continue
        row = setting_of(line, others) or "accuracy"
        group = line["arm"]
        if under_dp(line) and EPSILON in axes:
            group += f", epsilon {float(line[EPSILON]):g}"
        groups.setdefault(group, {})[row] = line["accuracy"]
        if line["accuracy_ci95"] is not None:
            errors[group, row] = line["accuracy_ci95"]
    title = "Accuracy of each arm"
    if len(groups) > figures.MAX_SERIES or sum(map(len, groups.values())) > 60:
        return {}
    return {title: figures.bars("arms", title, groups, label="accuracy", errors=errors)}


def _institutions(lines: Lines, axes: Sequence[str]) -> dict[str, Any]:
    """Compare before, alone and together for each institution, in the best setting under DP."""
    together = [x for x in lines if x["arm"].startswith("federated") and x["institution"] == ALL
                and x["accuracy"] is not None]  # fmt: skip
    if not together:
        return {}
    best = max(together, key=lambda line: (under_dp(line), line["accuracy"]))
    others = [axis for axis in axes if axis != EPSILON]
    groups: dict[str, dict[str, float]] = {}
    for line in lines:
        same = all(line[axis] == best[axis] for axis in others)
        budget = not under_dp(line) or line.get(EPSILON) == best.get(EPSILON)
        if line["institution"] != ALL and same and budget and line["accuracy"] is not None:
            group = "before (base)" if line["arm"] == "base" else line["arm"]
            groups.setdefault(group, {})[line["institution"]] = line["accuracy"]
    own = groups.get(best["arm"], {})
    if len(own) < 2:
        return {}
    order = sorted(own, key=lambda name: own[name])[:16]
    ranked = ["before (base)", "local", "local-dp", "federated", "federated-dp"]
    shown = {g: {n: groups[g][n] for n in order if n in groups[g]} for g in ranked if g in groups}
    known = {"before (base)": "before", "local": "alone", "federated": "together"}
    told = dict.fromkeys(known[group.removesuffix("-dp")] for group in shown)
    title = "Each institution" + f": {', '.join(told)}" * (len(told) > 1)
    if len(order) < len(own):
        title += f" (the {len(order)} lowest)"
    setting = setting_of(best, axes)
    gains = [own[n] - groups["local"][n] for n in own if n in groups.get("local", {})]
    words = [
        f"In the setting with the best result{' under DP' * under_dp(best)}"
        f"{f' ({setting})' if setting else ''}. The lowest accuracy is "
        f"{100 * own[order[0]]:.1f} %, at {order[0]}."
    ]
    if best["seeds"] > 1:
        words.append(
            "Each bar is a mean over seeds. Where seeds partition the records (iid, dirichlet), "
            "a name stands for another institution under each seed."
        )
    if gains:
        words.append(
            f"{sum(gain > 0 for gain in gains)} of {len(gains)} institutions do better in "
            f"{best['arm']} than alone without any noise."
        )
    return {
        "words": words,
        "figures": {
            title: figures.bars("institutions", title, shown, label="accuracy", worst=order[0])
        },
    }


def _joining(pooled: Lines, configs: Mapping[str, RunConfig], about: Mapping[str, Any]) -> Section:
    """Show the gain of joining where institutions trained at home; else an empty section."""
    if all(line.get("gain") is None for line in pooled):
        return Section(title=joining_page.TITLE)
    at_home = {cell: config for cell, config in configs.items() if config.home.method != "none"}
    promises = _home_promises(at_home, about)
    budget = min(config.privacy.epsilon for config in at_home.values())
    alike = _only_holdings(configs, about)
    drawn = joining_page.by_records(pooled, EPSILON, budget) if alike else {}
    words = [joining_page.MEANINGS, *promises]
    bars = any(line.get("gain_ci95") is not None for line in pooled)
    words += [joining_page.BARS] if drawn and bars else []
    return Section(title=joining_page.TITLE, words=words, figures=drawn)


def _home_promises(at_home: Mapping[str, RunConfig], about: Mapping[str, Any]) -> list[str]:
    """What DP says of models at home; where that differs, each text names the cells it is of."""
    found: dict[str, dict[str, None]] = {}
    noises = {config.privacy.noise for config in at_home.values()}
    for case in about["cases"]:
        for config in (at_home[cell] for cell in case["cells"].values() if cell in at_home):
            of = f"{case['arm']}"
            of += f" and privacy.noise {config.privacy.noise}" * (len(noises) > 1)
            found.setdefault(joining_page.home_promise(config), {})[of] = None
    if len(found) == 1:
        return list(found)
    return [f"In {', '.join(of)}: {text[0].lower()}{text[1:]}" for text, of in found.items()]


HOLDINGS = (
    "seed",
    "data.institutions",
    "data.min-records",
    "data.max-records",
    "home.institutions",
)
"""Keys of what institutions hold, and of how many are compared; of a partition at random the seed
is one."""


def _only_holdings(configs: Mapping[str, RunConfig], about: Mapping[str, Any]) -> bool:
    """Whether the federation's cells of one budget differ in nothing but `HOLDINGS`."""
    others: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for case in about["cases"]:
        if case["arm"].startswith("federated"):
            budget = case["arm"], str(case["axes"].get(EPSILON))
            found = others.setdefault(budget, set())
            for cell in case["cells"].values():
                if cell in configs:
                    config = configs[cell]
                    other = config.fingerprint(*HOLDINGS, "data.source", "data.test-source")
                    found.add((other, *_files(config)))
    return all(len(found) <= 1 for found in others.values())


def _as_many_steps(about: Mapping[str, Any], configs: Mapping[str, RunConfig]) -> bool:
    """Whether all arms that train take as many steps at each setting."""
    steps: dict[str, set[int]] = {}
    for case in about["cases"]:
        # an arm without DP has a budget of its own, at which no other runs
        axes = {key: value for key, value in case["axes"].items() if key != EPSILON}
        point = json.dumps([axes, case["seed"]], sort_keys=True)
        for config in (configs[cell] for cell in case["cells"].values() if cell in configs):
            if taken := config.federation.rounds * config.training.local_steps:
                steps.setdefault(point, set()).add(taken)
    return all(len(found) == 1 for found in steps.values())


def _data_sets(
    axes: Sequence[str], about: Mapping[str, Any], configs: Mapping[str, RunConfig]
) -> list[str]:
    """The axes whose values are different data sets: other records, or other classes of them."""
    sources: dict[str, dict[str, set[tuple[Any, ...]]]] = {axis: {} for axis in axes}
    for case in about["cases"]:
        read = [configs[cell] for cell in case["cells"].values() if cell in configs]
        own = {(*_files(c), c.data.text, c.data.label, *c.data.labels) for c in read}
        for axis, value in case["axes"].items():
            sources[axis].setdefault(str(value), set()).update(own)
    return [
        axis
        for axis, found in sources.items()
        if all(len(own) <= 1 for own in found.values()) and len(set().union(*found.values())) > 1
    ]


def _files(config: RunConfig) -> tuple[str, ...]:
    """The data's sources. A cell that ran in another checkout names a file by another path."""
    return tuple(
        str(Path(one).resolve()) if Path(one).is_absolute() else one
        for one in (config.data.source, config.data.test_source)
    )


def _dp(privacies: Sequence[PrivacyConfig]) -> Section:
    """State the privacy of the arms under DP."""
    private = [privacy for privacy in privacies if privacy.enabled]
    if not private:
        return Section(
            title="Privacy",
            note="Differential privacy was off everywhere: no run of this sweep protects anybody.",
            bad=True,
        )
    budgets = ", ".join(f"{e:g}" for e in sorted({p.epsilon for p in private}))
    units = ", ".join(sorted({p.unit for p in private}))
    if any(p.noise == "seeded" for p in private):
        return Section(
            title="Privacy",
            note="Noise came from seeds in the configuration. This sweep is a simulation: its "
            "adapters protect nobody, whatever epsilon says.",
            bad=True,
        )
    note = (
        f"Arms ending in -dp protect each {units} of an institution with epsilon {budgets} for the "
        "whole run, from everyone who sees the adapters. The other arms protect nobody. Many runs "
        "on the same records spend their budgets many times over: release one, not all."
    )
    if any(p.shares_noise for p in private):
        note += (
            " Under secure aggregation this holds while as many institutions as configured "
            "(privacy.honest) add their share of the noise; each cell's privacy.json has the "
            "larger epsilon of an institution if all others collude."
        )
    deltas = sorted({p.delta for p in private if p.delta})
    words = [
        "Delta: "
        + (", ".join(f"{d:g}" for d in deltas) or "by size class")
        + "; noise from the operating system. Each cell's privacy.json has the figures of each "
        "institution."
    ]  # fmt: skip
    return Section(title="Privacy", note=note, words=words)


def _environment(cells: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = [files[ENVIRONMENT] for files in cells]
    shas = sorted({commit(one) or "unknown" for one in found})
    section = environment(found[-1])
    words: list[str] = []
    if len(shas) > 1:
        words.append(f"Cells ran at {len(shas)} commits: {', '.join(shas)}.")
    packages = dict.fromkeys(name for one in found for name in one["versions"])
    dtypes = [files[RESULT]["base"].get("dtype", "unknown") for files in cells]
    of_cells: dict[str, list[Any]] = {
        **{name: [one[name] for one in found] for name in ("processor", "python")},
        **{name: [one["versions"].get(name) for one in found] for name in packages},
        "the base model's numbers": dtypes,
    }
    for name, values in of_cells.items():
        if len(others := sorted(set(map(str, values)))) > 1:
            words.append(f"They differ in {name}: {', '.join(others)}.")
    if words:
        words.append("Shown is the last.")
    return [Section(title=section.title, words=words, tables=section.tables)]

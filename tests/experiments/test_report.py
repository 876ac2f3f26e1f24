"""The pages on runs and sweeps: what they say, and that a browser shows them whole."""

import html
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from cli.main import app
from experiments import figures, opening, report, results
from experiments.audit import findings
from experiments.pages import NUMBER
from fedlora.config.config import from_flat, load
from fedlora.models import metrics
from fedlora.privacy import composition
from fedlora.privacy.odds import group_delta
from fedlora.rounding import at_most
from server import privacy_statement
from server.privacy_statement import promise
from tests.samples import compared

runner = CliRunner()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
METHODS = ("lora", "ffa", "dora")
BANKS = ("Alpha", "Beta", "Delta", "Gamma")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Where the first test leaves its run for the others."""
    return tmp_path_factory.mktemp("template") / "run"


@pytest.fixture
def run_directory(tiny_config, simulate_run, template):
    """A complete run of three rounds, as if its model were of use."""
    config = tiny_config(**{"privacy.noise": "secure"})
    if not template.exists():
        simulate_run(config)
        result = json.loads((Path(config.run_dir) / "result.json").read_text())
        for counts in result["per_class"].values():
            counts["predicted"] = 1
        result["accuracy"] = 0.75
        (Path(config.run_dir) / "result.json").write_text(json.dumps(result))
        shutil.copytree(config.run_dir, template)
        return Path(config.run_dir)
    shutil.copytree(template, config.run_dir)
    return Path(config.run_dir)


def change(directory, name, **values):
    """Other values in a JSON file of a run."""
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def settings(directory, **values):
    """Other values in a run's configuration."""
    path = directory / "config.toml"
    path.write_text(load(path).replace(values).to_toml())


def shown(directory):
    """The text of a run's page, without markup and with single blanks."""
    text = report.write(directory).read_text(encoding="utf-8")
    body = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def made_up_sweep(tmp_path, tiny_config, run_directory):
    """A sweep's directory whose cells were never run; its numbers are made up."""
    draw, out, cases = random.Random(3), tmp_path / "sweep", []
    level = {"base": 0.4, "local": 0.66, "central": 0.84, "federated": 0.8, "federated-dp": 0.78}
    for arm, mean in level.items():
        for epsilon in (1.0, 4.0, 8.0) if arm.endswith("-dp") else (math.inf,):
            for method in METHODS:
                for seed in (1, 2, 3):
                    name = f"{arm}-{epsilon:g}-{method}-{seed}"
                    axes = {"privacy.epsilon": epsilon if math.isfinite(epsilon) else "inf"}
                    axes["method"] = method
                    cases.append({"arm": arm, "axes": axes, "seed": seed, "cells": {"": name}})
                    folder = results.run_dir(out, name)
                    folder.mkdir(parents=True)
                    lost = 0.15 / epsilon if math.isfinite(epsilon) else 0.0
                    value = mean - lost + draw.gauss(0, 0.002)
                    own = {bank: value + draw.gauss(0, 0.03) for bank in BANKS}
                    result = {"accuracy": value, "macro_f1": value - 0.05, "seconds": 90.0}
                    result |= {"institutions": own, "epsilon_max": axes["privacy.epsilon"]}
                    result["base"] = {"dtype": "float32"}
                    (folder / "result.json").write_text(json.dumps(result))
                    config = tiny_config(
                        **{"privacy.epsilon": epsilon, "privacy.noise": "secure", "seed": seed}
                    )
                    (folder / "config.toml").write_text(config.to_toml())
                    shutil.copy(run_directory / "environment.json", folder)
    about = {"name": "epsilon", "command": "fedlora sweep epsilon.toml", "cases": cases}
    (out / results.MANIFEST).write_text(json.dumps(about))
    (out / "sweep.toml").write_text('base = "base.toml"')
    return out


def test_the_page_on_a_run_says_what_was_done_and_promised(run_directory):
    text = report.write(run_directory).read_text(encoding="utf-8")
    result = json.loads((run_directory / "result.json").read_text())
    privacy = json.loads((run_directory / "privacy.json").read_text())
    assert "4 institutions together taught" in text and "lora, rank 8" in text
    assert f"{100 * result['accuracy']:.1f} %" in text
    assert html.escape(privacy["protects"], quote=False)[:60] in html.unescape(text)
    assert 'class="note bad"' not in text
    for said in privacy["institutions"].values():  # one row for all, as they are the same
        assert at_most(said["epsilon"]) in text
    assert "each of the 4" in text
    assert "(worst)" in text and text.count("<svg") >= 5
    assert text.count("<svg") == text.count('role="img"') == text.count("<desc")
    environment = json.loads((run_directory / "environment.json").read_text())
    assert environment["versions"]["torch"] in text and environment["git_sha"] in text


def test_pages_are_drawn_without_torch():
    """It takes seconds to load, and a page reads files only."""
    code = "import experiments.report, experiments.sweep_page, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_page_loads_nothing_from_elsewhere(run_directory):
    text = report.write(run_directory).read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "@import" not in text and "url(http" not in text


def test_a_run_that_protects_nobody_is_marked(run_directory):
    for change in (("epsilon = 8.0", "epsilon = inf"), ('noise = "secure"', 'noise = "seeded"')):
        config = run_directory / "config.toml"
        before = config.read_text()
        assert change[0] in before
        config.write_text(before.replace(*change, 1))
        assert 'class="note bad"' in report.write(run_directory).read_text(encoding="utf-8")
        config.write_text(before)


def with_joining(directory, **changes):
    """Adds what joining gave to a run's result.json, and gives the page."""
    path = directory / "result.json"
    result = json.loads(path.read_text())
    result["joining"] = compared(BANKS, **changes)
    path.write_text(json.dumps(result))
    return report.write(directory).read_text(encoding="utf-8")


OPENING = ["Verdict", "What was promised", "Who must be trusted", "What the promise does not cover",
           "Identity"]  # fmt: skip


def test_the_page_says_first_what_joining_gives(run_directory):
    text = with_joining(run_directory)
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads[:6] == [*OPENING, "Warnings"]
    first = re.search(r"<h2>.*?</h2>\s*<p class=\"note *\">(.*?)</p>", text, re.DOTALL)
    # 20 and 16 of 22 rows at each of four banks
    assert first and first[1].startswith("Joining pays: own models are right on 90.9 %")
    assert "alone on 72.7 % (+18.2 points" in first[1]
    table = text[text.index("<h2>Verdict") : text.index("<h2>What was promised")]
    words = " ".join(re.sub(r"<[^>]*>", " ", table[table.index("<table") :]).split())
    assert "accuracy 72.7 50.0 90.9 macro-F1" in words  # alone, shared, own
    section = text[text.index("<h2>What joining gives") : text.index("<h2>Quality")]
    for said in (
        "no differential privacy",
        "must not be passed on",
        "validation records",
        "were measured on them once",
        "no held-out record is of a class",
    ):
        assert said in section, said
    assert section.count("<svg") == 1 and "Alpha 72.7 % alone and 90.9 % own" in section
    tables = section.split("<table")[1:]
    assert len(tables) == 2
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in tables[0].split("<tr>")[1:]]
    found = {head: first for head, first, *_ in rows}
    assert found["training records"] == "32 to 63" and found["of which lose"] == "0"
    assert [found[head] for head in ("alone, %", "shared, %", "own, %")] == ["72.7", "50.0", "90.9"]
    low, high = found["95 % interval"].split(" to ")
    assert float(low) < float(found["gain, points"]) == 18.2 < float(high)
    assert (
        section.count("<details>") == 1
        and "weight: share of the adapter trained at home" in section
    )
    assert ">+18.2</b><span>gain of joining, points" in text


def test_the_page_does_not_say_of_own_models_under_dp_that_they_have_none(run_directory):
    assert "under differential privacy of their own" not in with_joining(run_directory)
    path = run_directory / "result.json"
    result = json.loads(path.read_text())
    result["joining"]["epsilon"] = 2.0
    path.write_text(json.dumps(result))

    def section(**values):
        settings(run_directory, **{"home.method": "interpolate"}, **values)
        text = report.write(run_directory).read_text(encoding="utf-8")
        return text[text.index("<h2>What joining gives") : text.index("<h2>Quality")]

    found = section()
    assert "with epsilon 2 on top of the run" in found
    assert "Alone and own have no differential privacy" not in found
    assert "Alone has no differential privacy" in found
    seeded = section(**{"privacy.noise": "seeded"})
    assert "noise of own models came from a seed, which protects nobody" in seeded
    assert "with epsilon 2" not in seeded


@pytest.mark.parametrize(
    ("better", "worse", "mark", "said"),
    [(3, 3, "note caution", "no difference"), (1, 9, "note bad", "does not pay")],
)
def test_a_run_in_which_joining_does_not_pay_is_marked(run_directory, better, worse, mark, said):
    text = with_joining(run_directory, better=better, worse=worse)
    note = re.search(rf'class="{mark}">(.*?)</p>', text, re.DOTALL)
    assert note and said in note[1]


def test_a_gain_with_a_loss_in_macro_f1_is_marked_and_few_compared_are_counted(run_directory):
    gain = compared(BANKS[:3])
    gain["gain_macro_f1"] |= {"low": -0.2, "high": -0.1, "classes_with_few_texts": 0}
    gain["not_compared"] = {BANKS[3]: "timeout"}
    change(run_directory, "result.json", joining=gain)
    text = report.write(run_directory).read_text(encoding="utf-8")
    note = re.search(r'class="note caution">(.*?)</p>', text, re.DOTALL)
    assert note and note[1].startswith("Joining pays") and "In macro-F1" in note[1]
    first = text[text.index("<h2>Verdict") : text.index("<h2>What was promised")]
    assert "Compared were 3 of 4 institutions; 1 reply was refused." in first
    assert "Compared were" not in with_joining(run_directory)


@pytest.mark.parametrize("view", ["pooled", "only:Alpha"])
def test_a_run_without_a_federation_does_not_measure_joining(run_directory, view):
    config = run_directory / "config.toml"
    config.write_text(load(config).replace({"data.view": view}).to_toml())
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert "This run has no federation, so it does not measure joining." in text
    assert "trained a model alone" not in text


def test_the_page_says_how_many_models_alone_took_the_most_steps(run_directory):
    """Those that chose: institutions that held back 16 records or more."""
    joining = compared(BANKS)
    chose = [of for of in joining["institutions"].values() if of["held_back"] >= 16]
    chose[0]["alone_steps"] = load(run_directory / "config.toml").home.steps
    change(run_directory, "result.json", joining=joining)
    report.write(run_directory)
    text = (run_directory / "report.html").read_text(encoding="utf-8")
    assert f"Of {len(chose)} models alone that could choose their number of steps, 1 took" in text
    for of in joining["institutions"].values():
        of["held_back"] = 15
    change(run_directory, "result.json", joining=joining)
    report.write(run_directory)
    assert "that could choose" not in (run_directory / "report.html").read_text(encoding="utf-8")


def test_the_page_names_institutions_that_keep_the_model_alone(run_directory):
    none = f"0 of {len(BANKS)} institutions keep the model alone as their own."
    assert none in with_joining(run_directory)
    joining = compared(BANKS)
    joining["institutions"]["Beta"]["keeps_alone"] = True
    change(run_directory, "result.json", joining=joining)
    report.write(run_directory)
    text = (run_directory / "report.html").read_text(encoding="utf-8")
    assert f"1 of {len(BANKS)} institutions keep the model alone as their own: Beta." in text
    assert text.count(">alone</td>") == 1
    assert "by more than their own interval. 1 keeps the model alone as its own." in text
    for of in joining["institutions"].values():
        of["keeps_alone"] = True
    change(run_directory, "result.json", joining=joining)
    assert "Joining brings nothing: the model alone was clearly better, and stays: own models" in (
        report.write(run_directory).read_text(encoding="utf-8")
    )
    change(run_directory, "result.json", joining=joining | {"epsilon": 2.0})
    assert "keep the model alone as their own:" not in report.write(run_directory).read_text()


def test_the_page_says_what_chance_does_and_what_few_texts_cannot_show(run_directory):
    """All rows of `compared` are of one class; a model names another one, which has no text."""
    path, joining = run_directory / "result.json", compared(BANKS)
    text = with_joining(run_directory)
    assert "let about one institution in forty count as gaining" in text
    assert "With fewer than 10 different held-out texts there is no interval" in text
    assert "points, without an interval: 1 class has fewer than 8 different" in text
    joining["gain_macro_f1"]["classes_with_few_texts"] = 0
    change(run_directory, path.name, joining=joining)
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert "without an interval" not in text and "rare class can move it" in text


def test_a_run_without_models_at_home_says_nothing_of_joining(run_directory):
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert "What joining gives" not in text and "gain of joining" not in text


def test_a_run_whose_institutions_all_failed_at_home_says_so(run_directory):
    path = run_directory / "result.json"
    result = json.loads(path.read_text())
    result["joining"] = {
        "method": "interpolate",
        "seconds": 1.0,
        "not_compared": {"Beta": "timeout"},
    }
    path.write_text(json.dumps(result))
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert "No institution was compared" in text and "Beta (timeout)" in text


def test_a_simulation_says_that_one_file_held_all_records(run_directory):
    text = shown(run_directory)
    assert "one file and one machine held the records of all institutions" in text
    assert "No record left" not in text and "A simulation, ended 20" in text


def test_a_deployment_does_not_say_so(run_directory):
    config = load(run_directory / "config.toml").flat()
    config |= {"data.source": "institutions", "data.institutions": 4}
    config["data.labels"] = '["card", "fraud", "loan"]'
    (run_directory / "config.toml").write_text(from_flat(config).to_toml())
    text = shown(run_directory)
    assert "one file" not in text and "No record left an institution" in text


def test_the_promise_stands_as_odds(run_directory):
    odds = json.loads((run_directory / "privacy.json").read_text())["odds"]
    text = shown(run_directory)
    assert "this suspicion from 50 % to at most 99.97 %, and from 1 % to at most 96." in text
    assert f"except in at most 1 of {int(1 / odds['exceeded']):,} cases" in text
    assert odds["exceeded"] > 1e-4  # delta, which is less
    assert "8 is common" not in text
    found = 100 * odds["found"]["0.01"]
    said = re.search(r"wrongly accuses 1 % of those not trained on finds at most ([\d.]+) %", text)
    assert said and found <= float(said[1]) < found + 0.11
    right = re.search(r"right about more than ([\d.]+) %", text)
    assert right and 50 < float(right[1]) < 100
    assert "and for one with 3 or more it promises nothing" in text


@pytest.mark.parametrize(
    ("epsilon", "delta", "said"),
    [
        (8.0, 1e-5, "two records at an institution it is epsilon 16 at delta 0.03, and for one "
         "with 3 or more it promises nothing"),
        (1.0, 1e-5, "epsilon 2 at delta 3.8e-05, and for one with 13 or more it promises nothing"),
        (8.0, 1e-3, "a customer with two or more records at an institution it promises nothing"),
    ],
)  # fmt: skip
def test_a_promise_for_one_record_says_what_it_is_for_a_customer(epsilon, delta, said):
    assert said in opening.customer(epsilon, delta, "at an institution")
    shared = opening.customer(epsilon, delta, "at one or several institutions")
    assert said.replace("at an institution", "at one or several institutions") in shared


def test_a_promise_for_a_customer_says_what_it_is_at_two_institutions_with_one_noise():
    assert opening.customer_of_two(8.0, 1e-5).endswith("epsilon 16 at delta 0.03.")
    assert opening.customer_of_two(8.0, 1e-3).endswith("a customer of both nothing.")


@pytest.mark.parametrize(
    ("share", "up", "said"),
    [(0.9996646, True, "99.97 %"), (0.73106, True, "73.2 %"), (0.5, False, "50 %"),
     (0.001, False, "0.1 %"), (0.0001, True, "0.01 %"), (0.999999, True, "100 %"),
     (1.0, True, "100 %"), (0.1234, True, "12.4 %")],
)  # fmt: skip
def test_a_bound_in_percent_is_never_rounded_down(share, up, said):
    assert opening.percent(share, up=up) == said


def test_the_page_names_ledger_held_out_rows_and_trust(run_directory):
    text = shown(run_directory)
    assert "epsilon 0" in text and "of 8, at delta 0.0001" in text and "new ledgers" in text
    assert "come from 94 held-out rows, which nothing protects" in text
    assert "neither the server nor all other institutions together learn more" in text
    assert "This run was not attacked as a test" in text


def test_a_run_that_still_learns_says_what_more_rounds_cost(run_directory):
    rising = {"points": 5.3, "since": 15, "until": 30, "more_rounds": 15}
    rising |= {"epsilon": 9.69, "noise": 1.12}
    change(run_directory, "result.json", still_rising=rising)
    text = shown(run_directory)
    assert "(+5.3 points since round 15 to round 30)" in text
    assert "12 % more noise at the same epsilon." in text
    assert "epsilon.." not in text


def test_under_secure_aggregation_the_page_names_whom_to_trust(run_directory):
    config = run_directory / "config.toml"
    secure = load(config, {
        "privacy.trust": "secure-aggregation", "privacy.honest": 2, "privacy.colluding": 1,
        "federation.weighting": "public-size",
    })  # fmt: skip
    config.write_text(secure.to_toml())
    path = run_directory / "privacy.json"
    privacy = json.loads(path.read_text())
    for one in privacy["institutions"].values():
        one["epsilon_alone"] = "inf"
    numbers = {"honest": 2, "colluding": 1, "institutions": 4, "least_survivors": 3}
    path.write_text(json.dumps(privacy | {"secure_aggregation": numbers}))
    text = shown(run_directory)
    assert "h = 2 honest institutions of 4" in text and "up to t = 1 institutions" in text
    assert "which promises no finite epsilon" in text
    for one in privacy["institutions"].values():
        one["epsilon_alone"] = 13.4
    silent = {"Quiet": {"rounds_asked": 1, "epsilon_at_most": 8.0, "delta": 1e-5}}
    for extra, said in (({}, "promises epsilon 13.4"), ({"without_report": silent}, "no finite")):
        path.write_text(json.dumps(privacy | {"secure_aggregation": numbers} | extra))
        assert said in shown(run_directory)
    path.write_text(json.dumps(privacy | {"secure_aggregation": numbers}))
    assert "nobody else" not in text
    assert "For a customer with two records at one or several institutions" in text
    config.write_text(secure.replace({"privacy.unit": "label"}).to_toml())
    assert "Records at two institutions move one sum" in shown(run_directory)


def test_a_model_that_has_learned_nothing_and_a_void_result_stand_at_the_top(run_directory):
    result = json.loads((run_directory / "result.json").read_text())
    classes = {n: c | {"predicted": 0} for n, c in result["per_class"].items()}
    classes["loan"]["predicted"] = 98
    change(run_directory, "result.json", per_class=classes, joining=compared(BANKS))
    text = report.write(run_directory).read_text(encoding="utf-8")
    note = re.search(r'<p class="note bad">(.*?)</p>', text, re.DOTALL)
    assert note and note[1] == (
        "The shared adapter has learned nothing yet: it answers loan for every row."
    )
    assert text.index("Joining pays") < text.index("What was promised")
    change(run_directory, "result.json", findings=[{"text": "delta is 0.1", "voids": True}])
    text = report.write(run_directory).read_text(encoding="utf-8")
    note = re.search(r'<p class="note bad">(.*?)</p>', text, re.DOTALL)
    assert note and note[1] == "The result is void, and the run accepted it: delta is 0.1."


def test_a_sweep_names_void_runs_first(made_up_sweep):
    assert "Void runs" not in report.write(made_up_sweep).read_text(encoding="utf-8")
    cell = next((made_up_sweep / "cells").iterdir())
    change(cell, "result.json", findings=[{"text": "delta is 0.1", "voids": True}])
    text = report.write(made_up_sweep).read_text(encoding="utf-8")
    assert "The results of 1 of this sweep&#39;s runs are void" in text
    assert text.index("delta is 0.1") < text.index("Conclusion")


def test_a_promise_whose_delta_is_not_known_of_all_still_has_its_epsilon(run_directory):
    """In a deployment delta goes by size class, and an institution without a report has none."""
    change(run_directory, "result.json", delta=None)
    change(run_directory, "privacy.json", without_report={"Beta": {"epsilon_at_most": 9.0}})
    text = shown(run_directory)
    assert "Epsilon 9 at most, for whether a certain record was trained on." in text
    assert "not known of 1 institution without a report" in text


def test_a_run_that_shows_nothing_is_not_green(run_directory):
    change(run_directory, "result.json", n=0, not_evaluated={"Beta": "timeout"})
    result = json.loads((run_directory / "result.json").read_text())
    for key in ("accuracy", "per_class"):
        del result[key]
    (run_directory / "result.json").write_text(json.dumps(result))
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert re.search(r'class="note caution">\s*Nothing was measured', text)
    assert "Not measured, because the reply was refused: Beta (timeout)." in text


def test_a_model_that_is_no_better_than_the_most_frequent_class_is_marked(run_directory):
    result = json.loads((run_directory / "result.json").read_text())
    most = max(c["truth"] for c in result["per_class"].values()) / 94
    least = metrics.majority_macro_f1(result["per_class"])
    for accuracy, macro_f1, useless, beaten in (
        (most, least, True, True),
        (most, least + 0.01, False, False),  # it finds the rarer classes
        (most + 0.01, least, False, True),
    ):
        change(run_directory, "result.json", accuracy=accuracy, macro_f1=macro_f1)
        text = shown(run_directory)
        assert ("of no use yet" in text) == useless
        assert ("which its accuracy does not beat" in text) != beaten
        assert ('class="note bad"' in (run_directory / "report.html").read_text()) == useless


def test_rows_of_one_class_mark_no_model(run_directory):
    one = {"truth": 12, "predicted": 12, "correct": 12}
    classes = {"card": one, "loan": dict.fromkeys(one, 0)}
    change(run_directory, "result.json", n=12, accuracy=1.0, macro_f1=1.0, per_class=classes)
    text = shown(run_directory)
    assert "of no use yet" not in text and "has learned nothing" not in text


def test_the_page_of_written_answers_counts_those_that_were_generated(run_directory):
    path = run_directory / "result.json"
    result = json.loads(path.read_text())
    for key in ("accuracy", "macro_f1", "per_class", "loss"):
        del result[key]
    result |= {"n": 5000, "token_loss": 1.2, "exact_match": 0.31, "generated": 200, "labels": []}
    path.write_text(json.dumps(result))
    config = load(run_directory / "config.toml", {"model.task": "sft"})
    (run_directory / "config.toml").write_text(config.to_toml())
    text = shown(run_directory)
    assert "is right on 31.0 % of 200 held-out rows" in text
    assert "come from 5,000 held-out rows (those of answers from 200 of them)" in text


def test_rounds_that_changed_nothing_and_an_early_end_are_said(run_directory):
    text = shown(run_directory)
    assert "changed nothing" not in text and "The run ended" not in text
    path = run_directory / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["skipped"] = True
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    change(run_directory, "result.json", rounds=2)
    text = shown(run_directory)
    for said in ("1 of 2 rounds changed nothing", "The run ended after 2 of 3 rounds"):
        assert text.index(said) < text.index("What was promised") < text.rindex(said)
    assert "the server combined the updates of 1 round (fedavg" in text


def test_unused_updates_are_counted_by_institution_and_reason(run_directory):
    path = run_directory / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rejected = [{"Beta": "krum"}, {"Beta": "krum", "Alpha": "too-long"}, {"Beta": "no-answer"}]
    for line, of in zip(lines, rejected, strict=True):
        line["aggregation"]["rejected"] = of
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = report._aggregation(lines)
    assert section["tables"][0].rows[1:] == [
        ["Alpha", "too-long", "1", "2", "2"],
        ["Beta", "krum", "2", "1", "2"],
        ["Beta", "no-answer", "1", "3", "3"],
    ]
    assert "Unused updates" in shown(run_directory)
    for line in lines:
        line["aggregation"]["rejected"] = {}
    assert report._aggregation(lines)["tables"] == []


def test_warnings_that_came_at_the_end_are_none_of_the_beginning(run_directory):
    late = {"name": "took-no-part", "text": "1 institutions took no part", "voids": False}
    for found, said in (([late], "There is 1 warning:"), ([late] * 2, "There are 2 warnings:")):
        change(run_directory, "result.json", findings=found)
        text = shown(run_directory)
        assert said in text and "began with" not in text


def test_the_report_of_an_audit_that_did_not_finish_says_so(run_directory, tmp_path):
    out = tmp_path / "audit"
    shutil.copytree(run_directory, out / "run")
    (out / "run" / "result.json").unlink()
    result = runner.invoke(app, ["report", str(out)])
    assert result.exit_code == 2 and "did not finish" in result.stderr
    assert "another --out" in result.stderr and "--resume" not in result.stderr


def test_names_with_dollar_signs_are_no_formulas():
    names = ["$5 and $10", r"a $\foo$"]
    svg = figures.bars("x", "title", {"accuracy": dict.fromkeys(names, 0.5)}, label="accuracy")
    assert all(f">{name}</text>" in svg for name in names)
    far = {"error": {1: 0.001, 2: 1.0}}
    ticks = re.findall(r">([^<>]*)</text>", figures.by_round("x", "title", far, label="error"))
    assert {"0.001", "0.01", "0.1"} <= set(ticks) and not any("$" in tick for tick in ticks)


def test_a_class_without_rows_leaves_an_empty_cell(run_directory):
    nothing = {"truth": 0, "predicted": 0, "correct": 0}
    result = json.loads((run_directory / "result.json").read_text())
    change(run_directory, "result.json", per_class={**result["per_class"], "rare": nothing})
    assert "nan" not in re.sub(r"<style.*?</style>", "", shown(run_directory)).split()


AUDIT = {
    "epsilon": 1.0, "delta": 1e-4, "protects": "Each record.", "accuracy": 0.5, "refuted": False,
    "canaries": {
        "planted": 5, "in all": 10, "most they can show": 2.0, "kinds": {"random": 10},
        "the final adapter": {"epsilon": 0.3, "guesses": 4, "right": 3, "confidence": 0.975},
    },
    "noise": {"source": "secure", "bound": 0.5, "cosine": None}, "membership": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("shows", "cosine", "reason"),
    [
        (0.3, None, ""),
        (1.4, None, "attacks from the final adapter show epsilon 1.4 at least, and 1 was promised"),
        (0.3, 0.99, "two updates share their noise (cosine 0.99; above 0.5 it was used twice)"),
    ],
)
def test_an_audit_has_a_page_and_its_run_says_what_it_found(
    run_directory, tmp_path, shows, cosine, reason
):
    out = tmp_path / "audit"
    shutil.copytree(run_directory, out / "run")
    found = json.loads(json.dumps(AUDIT)) | {"refuted": bool(reason)}
    found["canaries"]["the final adapter"]["epsilon"] = shows
    found["noise"] |= {"cosine": cosine, "left_out": 0}
    assert findings.broken_by(found) == reason
    (out / "audit.json").write_text(json.dumps(found))
    text, of_run = shown(out), shown(out / "run")
    assert "Privacy audit: audit" in text
    assert (f"The promise is broken: {reason}." in text) == bool(reason)
    assert "from the final adapter: 3 of 4 guesses right" in text
    assert "An audit attacked this run" in of_run
    assert (f"the promise IS BROKEN, for {reason}." in of_run) == bool(reason)
    assert f"show epsilon {shows} at least" in of_run and "if all others collude" not in text


def test_an_audit_that_could_not_have_refuted_is_marked(run_directory, tmp_path):
    shutil.copytree(run_directory, tmp_path / "audit/run")
    for most, marked in ((9.0, False), (7.0, True)):
        canaries = AUDIT["canaries"] | {"most they can show": most}
        promised = {"epsilon": 8.0, "refuted": False, "canaries": canaries}
        promised["noise"] = AUDIT["noise"] | {"left_out": 0}
        (tmp_path / "audit/audit.json").write_text(json.dumps(AUDIT | promised))
        text = report.write(tmp_path / "audit").read_text(encoding="utf-8")
        assert ('class="note caution"' in text) == marked


def test_an_audit_of_a_run_without_a_promise_says_so_on_the_run_s_page(run_directory, tmp_path):
    out = tmp_path / "audit"
    shutil.copytree(run_directory, out / "run")
    (out / "audit.json").write_text(json.dumps(AUDIT | {"epsilon": "inf"}))
    assert "An audit attacked this run; nothing was promised. Its" in shown(out / "run")


def test_an_audit_of_a_run_with_seeded_noise_does_not_confirm_a_promise(run_directory, tmp_path):
    out = tmp_path / "audit"
    shutil.copytree(run_directory, out / "run")
    noise = AUDIT["noise"] | {"source": "seeded", "left_out": 0}
    (out / "audit.json").write_text(json.dumps(AUDIT | {"noise": noise}))
    text, of_run = shown(out), shown(out / "run")
    assert "Nothing was promised, as the noise came from a seed" in text
    assert "epsilon at most, were the noise secret" in text and "promised: epsilon" not in text
    assert "not refuted" not in text + of_run
    assert "An audit attacked this run; nothing was promised, as the noise came" in of_run


def test_the_page_of_a_run_whose_ledgers_have_earlier_runs_states_their_sum(run_directory):
    """It is the promise of an adapter that continues another; a customer's is worse by as much."""
    privacy = json.loads((run_directory / "privacy.json").read_text())
    before = shown(run_directory)
    assert "largest epsilon (smaller is more private)" in before and "All runs on" not in before
    one = min(privacy["institutions"].values(), key=lambda of: of["noise_multiplier"])
    one |= {"ledger_epsilon": 11.19, "ledger_epsilon_alone": 11.19}
    one |= {"ledger_limit": 20.0, "ledger_delta": 1e-4}
    change(run_directory, "privacy.json", institutions=privacy["institutions"])
    text = shown(run_directory)
    assert "the ledgers of these records were charged for together: epsilon 11.19" in text
    assert "largest epsilon, all runs on the records" in text and "of this run alone" in text
    assert "with two or more records at an institution it promises nothing" in text
    assert "others collude" not in text
    one["ledger_epsilon_alone"] = 40.51  # earlier runs had secure aggregation
    change(run_directory, "privacy.json", institutions=privacy["institutions"])
    assert "If all others collude in them, it is epsilon 40.51." in shown(run_directory)
    other = next(of for of in privacy["institutions"].values() if of is not one)
    other |= {"ledger_epsilon": 50.0, "ledger_epsilon_alone": 50.0, "ledger_limit": 60.0}
    change(run_directory, "privacy.json", institutions=privacy["institutions"])
    assert "others collude" not in shown(run_directory)  # the largest of all is another's


def test_all_runs_together_are_those_of_the_institution_with_the_most(run_directory):
    """One that joined late may have an earlier run and still less than all others."""
    privacy = json.loads((run_directory / "privacy.json").read_text())
    first, *others = privacy["institutions"].values()
    most = max(one["ledger_epsilon"] for one in others)
    first |= {"steps": 1, "epsilon": 0.1, "ledger_epsilon": 0.99 * most}
    found = privacy_statement.with_earlier_runs(load(run_directory / "config.toml"), privacy)
    assert found["ledger_epsilon"] == most


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_whether_a_ledger_has_other_runs_is_seen_at_its_own_delta(run_directory, accountant):
    """Its epsilon may be below the run's where its delta is larger, and above where it is less."""
    config = load(run_directory / "config.toml")
    privacy = json.loads((run_directory / "privacy.json").read_text())
    one = next(iter(privacy["institutions"].values()))
    own = privacy_statement.history(config, one)
    for delta in (1e-3, 1e-8):
        for events, others in ((own, False), ((*own, *own), True)):
            spent = composition.epsilon(events, delta, accountant)
            entry = one | {"ledger_epsilon": spent, "ledger_delta": delta}
            found = privacy_statement.with_earlier_runs(config, {"institutions": {"a": entry}})
            assert (found == entry) == others and (found is None) != others
            more = entry | {"steps": one["steps"] + 1, "unreported_steps": 1}
            found = privacy_statement.with_earlier_runs(config, {"institutions": {"a": more}})
            assert (found == more) == others and (found is None) != others


@pytest.mark.parametrize("epsilon", [1e-4, 0.002, 0.5])
def test_from_how_many_records_on_nothing_is_promised_is_found_at_once(epsilon):
    said = opening.customer(epsilon, 1e-5, "at an institution")
    most = int(re.search(r"with (\d+) or more it", said)[1]) - 1
    assert group_delta(epsilon, 1e-5, most) < 1 <= group_delta(epsilon, 1e-5, most + 1)


def test_what_an_attack_shows_if_all_others_collude_stands_beside_its_own_promise(
    run_directory, tmp_path
):
    out, alone = tmp_path / "audit", "every round, by a server that knows all vectors but one"
    shutil.copytree(run_directory, out / "run")
    attack = {"epsilon": 3.2, "guesses": 4, "right": 4, "confidence": 0.975}
    found = AUDIT | {"epsilon_alone": 13.4, "canaries": AUDIT["canaries"] | {alone: attack}}
    (out / "audit.json").write_text(json.dumps(found))
    text = " ".join(re.sub(r"<[^>]*>", " ", shown(out)).split())
    assert "0.3 shown by attacks: epsilon at least" in text
    assert "13.4 promised if all others collude 3.2 shown by attacks if they do" in text
    assert "show epsilon 0.3 at least" in shown(out / "run")


def test_a_sweep_says_in_what_its_cells_differ(made_up_sweep):
    assert "They differ in" not in shown(made_up_sweep)
    cell = next((made_up_sweep / "cells").iterdir())
    about, result = (
        json.loads((cell / name).read_text()) for name in ("environment.json", "result.json")
    )
    torch_before = about["versions"]["torch"]
    about["versions"]["torch"], about["processor"] = "9.9", "another one"
    result["base"]["dtype"] = "bfloat16"
    (cell / "environment.json").write_text(json.dumps(about))
    (cell / "result.json").write_text(json.dumps(result))
    text = shown(made_up_sweep)
    assert (
        f"They differ in torch: {torch_before}, 9.9." in text
        and "They differ in processor: " in text
    )
    assert "They differ in the base model's numbers: bfloat16, float32." in text


def test_a_sweep_begins_with_its_conclusion(made_up_sweep):
    text = shown(made_up_sweep)
    first = text[text.index("Conclusion") : text.index("Privacy", text.index("Conclusion") + 200)]
    assert "Joining pays: federated-dp (epsilon 8, " in first
    assert "points against each institution alone, 95 % interval ±" in first
    assert "Too few seeds" not in text and "chosen as the best of several" in text
    assert "Without differential privacy the same setting is right on" in text
    path = made_up_sweep / results.MANIFEST
    about = json.loads(path.read_text())
    whole = path.read_text()
    about["cases"] = [c for c in about["cases"] if c["seed"] == 1 or c["arm"] != "federated"]
    path.write_text(json.dumps(about))
    assert "Without differential privacy the same" not in shown(made_up_sweep)  # of fewer seeds
    about = json.loads(whole)
    about["cases"] = [case for case in about["cases"] if case["seed"] == 1]
    path.write_text(json.dumps(about))
    text = shown(made_up_sweep)
    assert "Joining makes no difference that these seeds can show" in text
    assert "Too few seeds: one seed gives no interval" in text


@pytest.mark.parametrize("key", ["data.source", "data.label"])
def test_data_sets_of_a_sweep_are_concluded_one_by_one(made_up_sweep, key):
    """The accuracy of one data set is not the best setting of another."""
    whole = shown(made_up_sweep)
    assert "best setting" in whole and "In the setting with the best result" in whole
    for file in made_up_sweep.glob("cells/*/config.toml"):
        method = next(m for m in METHODS if f"-{m}-" in file.parent.name)
        file.write_text(load(file).replace({key: method}).to_toml())
    text = shown(made_up_sweep)
    for method in METHODS:
        assert f"{method}: Joining pays: federated-dp (epsilon 8) is right on" in text
    assert text.count("Without differential privacy the same setting is") == len(METHODS)
    assert "best setting, " not in text and "(best setting)" not in text
    assert "In the setting with the best result" not in text and "as the best of" in text


def test_bars_leave_no_blank_space_above_the_first_and_below_the_last(monkeypatch):
    axes = Figure().add_subplot()
    monkeypatch.setattr(figures, "draw", lambda name, title, says, plot, height: plot(axes) or "")
    rows = {f"bank {i}": 0.5 for i in range(40)}
    figures.bars("x", "title", {"accuracy": rows}, label="accuracy")
    low, high = min(axes.get_ylim()), max(axes.get_ylim())
    first = min(bar.get_y() for bar in axes.patches)
    last = max(bar.get_y() + bar.get_height() for bar in axes.patches)
    assert first - low < 0.2 and high - last < 0.2  # a bar takes 0.8 of its row
    assert axes.yaxis_inverted()  # the first row is on top


def test_a_long_name_leaves_the_bars_their_room(monkeypatch):
    axes = Figure().add_subplot()
    monkeypatch.setattr(figures, "draw", lambda name, title, says, plot, height: plot(axes) or "")
    names = ["TRANSUNION-INTERMEDIATE-HOLDINGS-INC", "A" * 26]
    for more, long in (
        (0, "TRANSUNION-INTERMEDIATE-\nHOLDINGS-INC"),
        (11, "TRANSUNION-INTERM…INGS-INC"),
    ):
        rows = [*names, *map(str, range(more))]
        figures.bars("x", "title", {"accuracy": dict.fromkeys(rows, 0.5)}, label="accuracy")
        shown_names = [tick.get_text() for tick in axes.get_yticklabels()]
        assert shown_names[:2] == [long, "A" * 26]


def test_names_that_differ_in_the_middle_stay_different():
    names = [f"Sparkasse-Region-Mittel-{letter}-Hauptfiliale" for letter in "ABC"]
    cut = figures.shortened([*names, "short"])
    assert len(set(cut)) == 4 and max(map(len, cut)) <= figures.MAX_NAME and cut[3] == "short"


def test_names_from_data_cannot_become_markup(run_directory):
    path = run_directory / "result.json"
    result = json.loads(path.read_text())
    result["labels"] = ["<script>alert(1)</script>"]
    result["per_class"] = {"<script>alert(1)</script>": {"truth": 1, "predicted": 1, "correct": 1}}
    result["institutions"] = {"<img src=x>": 0.5, "</svg><script>": 0.4}
    result["joining"] = compared(["<img src=x>", "</svg><script>"])
    path.write_text(json.dumps(result))
    text = report.write(run_directory).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img" not in text and "</svg><script>" not in text


def test_the_page_on_a_sweep_shows_privacy_against_accuracy(made_up_sweep):
    text = report.write(made_up_sweep).read_text(encoding="utf-8")
    assert "Accuracy against the privacy budget" in text
    assert "federated-dp: ffa" in text and "central" in text and "no DP" in text
    assert "before (base)" in text and "(worst)" in text
    assert "+" in text and "±" in text


def test_what_is_no_run_is_refused(tmp_path):
    result = runner.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "result.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_report_that_cannot_be_drawn_fails_no_run(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "x.toml").write_text(
        tiny_config(**{"run-dir": "", "federation.rounds": 1}).to_toml()
    )

    def broken(directory):
        raise RuntimeError("no pencil")

    monkeypatch.setattr(report, "write", broken)
    out = tmp_path / "out"
    command = ["run", str(tmp_path / "x.toml"), "--out", str(out), "--engine", "inline", "--quiet"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0 and "no pencil" in result.stderr
    assert (out / "result.json").exists()


def test_long_names_fit_into_a_legend():
    """matplotlib centres a legend, so a legend that is too wide begins left of the picture."""
    names = [f"federated-epsilon-{n}-seed-1-0f17f4fea9a2" for n in (1, 8)]
    svg = figures.bars("x", "title", {n: {"Alpha": 0.5} for n in names}, label="accuracy")
    for name in names:
        start = re.search(rf' x="([-\d.]+)"[^>]*>{name}</text>', svg)
        assert start and float(start[1]) > 26, start  # the coloured bar before it takes 25 points


def test_numbers_in_tables_are_told_from_words():
    for text in ("1", "-0.5", "7.1 ± 0.2", "inf", "1e-05", "+2.0", "1,204"):
        assert NUMBER.fullmatch(text), text
    for text in ("Alpha", "lora", "", "62.1 (Beta)"):
        assert not NUMBER.fullmatch(text), text


PROBE = """
<iframe id="page" style="width:%dpx;height:900px;border:0" srcdoc="%s"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const boxes = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  const head = page.querySelector("table.sorted th button");
  const body = head.closest("table").tBodies[0];
  const column = () => [...body.rows].map((row) => row.cells[0].textContent);
  head.click(); const up = column(); head.click(); const down = column();
  document.getElementById("found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    figures: boxes.filter((box) => box.width > 200 && box.height > 100).length,
    svgs: boxes.length,
    paths: page.querySelectorAll("svg path").length,
    up: up, down: down,
  });
});
</script>
"""


def browse(path: Path, width: int, tmp_path: Path) -> tuple[dict, str]:
    """What a browser makes of a page at a width, and what it says on its console."""
    probe = tmp_path / f"probe-{width}.html"
    probe.write_text(PROBE % (width, html.escape(path.read_text(encoding="utf-8"))))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=10000", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), "\n".join(console)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")
def test_the_first_sheet_on_paper_holds_the_whole_opening(run_directory, tmp_path):
    """Also with the long promise of secure aggregation."""
    config = run_directory / "config.toml"
    values = {"privacy.trust": "secure-aggregation", "privacy.honest": 2, "privacy.colluding": 1,
              "federation.weighting": "public-size"}  # fmt: skip
    config.write_text(load(config, values).to_toml())
    path = run_directory / "privacy.json"
    privacy = json.loads(path.read_text()) | promise(load(config), follows=False)
    for one in privacy["institutions"].values():
        one["epsilon_alone"] = 40.0
    numbers = {"honest": 2, "colluding": 1, "institutions": 4, "least_survivors": 3}
    path.write_text(json.dumps(privacy | {"secure_aggregation": numbers}))
    text = with_joining(run_directory)
    end = text.rindex("<section>", 0, text.index("<h2>Warnings"))
    sheet = tmp_path / "sheet.html"
    sheet.write_text(text[:end] + "</main></body></html>")
    for file, least, most in ((sheet, 1, 1), (run_directory / "report.html", 3, 99)):
        pdf = tmp_path / "page.pdf"
        command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}"]
        subprocess.run([*command, file.as_uri()], capture_output=True, timeout=120, check=True)
        pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
        assert least <= pages <= most


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_browser_shows_all_of_it_on_a_phone_and_a_desk(
    kind, width, run_directory, made_up_sweep, tmp_path
):
    path = report.write(run_directory if kind == "run" else made_up_sweep)
    found, console = browse(path, width, tmp_path)
    assert not console
    assert found["width"] <= width
    assert found["figures"] == found["svgs"] >= 3 and found["paths"] > 50
    assert found["up"] == sorted(found["up"]) and found["down"] == found["up"][::-1]

"""Sweeps: what a file expands to, what is refused before anything runs, what is reported."""

import csv
import fcntl
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.simulation_commands import execute
from client import alone_models
from experiments import cells, conclusion, joining_page, results, sweep, sweep_page
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.data.partition import file_names
from fedlora.errors import InputError
from fedlora.runs import run_files
from fedlora.terminal import Terminal
from tests.samples import compared

runner = CliRunner()
KEY = "5a" * 32
ALL_ARMS = (
    'arms = ["base", "local", "local-dp", "central", "central-dp", "federated", "federated-dp"]'
)


@pytest.fixture
def sweep_file(tmp_path, tiny_config):
    """Writes a sweep over the tiny encoder; keyword values change its base."""

    def write(text, **values):
        base = tiny_config(**({"run-dir": "", "federation.rounds": 2} | values))
        (tmp_path / "base.toml").write_text(base.to_toml())
        path = tmp_path / "mine.toml"
        path.write_text(f'base = "base.toml"\n{text}')
        return path

    return write


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def save_cell(folder, result, **values):
    """Write what the results of a sweep read of a cell."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(from_flat(values).to_toml())
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text('{"git_sha": "f", "git_dirty": false}')


def summary(out):
    return results.summary(results.read(out))


def test_arms_share_every_held_out_row(sweep_file):
    made, needed = sweep.cells(sweep.read(sweep_file(f"{ALL_ARMS}\n[grid]\nseed = [1, 2]")), KEY)
    by_seed: dict[int, set[str]] = {}
    for case in needed:
        rows, seed = [], 0
        for name in case.values():
            seen = records.load(made[name].config)
            seed = made[name].config.seed
            rows.append(seen.all_held_out.records)
        whole = np.concatenate(rows)
        digest = b"".join(sorted(row.tobytes() for row in whole)).hex()
        by_seed.setdefault(seed, set()).add(digest)
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[1] != by_seed[2]


def test_arms_train_on_the_same_rows_in_different_hands(sweep_file):
    made, needed = sweep.cells(sweep.read(sweep_file(f"{ALL_ARMS}\n[grid]\nseed = [1]")), KEY)

    def rows(names):
        return sorted(
            row.tobytes()
            for name in names
            for row in records.load(made[name].config).all_train.records
        )

    assert len({tuple(rows(case.values())) for case in needed}) == 1
    assert [len(case) for case in needed] == [1, 4, 4, 1, 1, 1, 1]
    assert {made[name].institutions for name in needed[3].values()} == {1}


def test_pooled_customers_of_two_banks_stay_two_units(tiny_config):
    config = tiny_config(**{"privacy.unit": "customer"})
    federation = records.load(config)
    apart = sum(federation.train(i).num_units for i in range(4))
    pooled = records.load(config.replace({"data.view": "pooled"}))
    assert pooled.train(0).num_units == apart
    assert np.array_equal(pooled.all_held_out.records, federation.all_held_out.records)


def test_the_label_of_a_budget_at_home_is_what_the_arm_ran_with(sweep_file):
    text = 'arms = ["local", "local-dp", "federated", "federated-dp"]\n'
    cases = sweep.read(
        sweep_file(f"{text}[grid]\nhome.epsilon = [2.0, 4.0]", **{"home.method": "fine-tune"})
    )
    assert [(case.arm, case.axes["home.epsilon"]) for case in cases] == [
        *((arm, math.inf) for arm in ("local", "local-dp", "federated")),
        *(("federated-dp", value) for value in (2.0, 4.0)),
    ]
    assert all(case.axes["home.epsilon"] == case.config.home.epsilon for case in cases)


def test_arms_that_train_nothing_at_home_are_what_each_budget_at_home_is_compared_with():
    def case(arm, budget, accuracy):
        found = {"drawn": 0.2, "joining": None, "not_compared": 0, "bytes": 0, "seconds": 1.0}
        found |= {"epsilon": 8.0, "delta": None}
        axes = {"privacy.epsilon": "inf" if arm == "local" else 8.0, "home.epsilon": budget}
        found |= {"score": accuracy, "macro_f1": accuracy, "institutions": {"A": accuracy}}
        return {"arm": arm, "axes": axes, "seed": 1}, found

    local, local_dp = case("local", "inf", 0.5), case("local-dp", "inf", 0.25)
    by_key = {
        results.case_key(one["arm"], one["axes"], 1): found for one, found in (local, local_dp)
    }
    line = results._line(results.ALL, [case("federated-dp", 2.0, 0.75)], by_key)
    assert (line["gain_over_local"], line["gain_over_local_dp"]) == (0.25, 0.5)


@pytest.mark.parametrize(
    "always",
    [
        "",
        "home.epsilon = 8.0",
        'privacy.trust = "secure-aggregation"\nprivacy.honest = 3\n'
        'federation.weighting = "public-size"',
    ],
)
def test_an_arm_without_dp_is_one_case_for_all_budgets(sweep_file, always):
    grid = "[grid]\nprivacy.epsilon = [1.0, 8.0, inf]"
    text = f'arms = ["base", "federated", "federated-dp"]\n[set]\n{always}\n{grid}'
    cases = sweep.read(sweep_file(text, **{"home.method": "fine-tune"}))
    assert [(c.arm, c.axes["privacy.epsilon"]) for c in cases] == [
        ("base", math.inf),
        ("federated", math.inf),
        ("federated-dp", 1.0),
        ("federated-dp", 8.0),
    ]
    assert cases[0].config.federation.rounds == 0


def test_variants_set_several_keys_and_arms_have_settings_of_their_own(sweep_file):
    text = """
arms = ["local", "federated"]
[set]
"federation.rounds" = 4
[set.local]
training.learning-rate = 0.5
[grid.method]
ffa = { "federation.strategy" = "ffa" }
dora = { adapter.method = "dora", adapter.rank = 4 }
"""
    cases = sweep.read(sweep_file(text))
    found = {(c.arm, c.axes["method"]): c.config for c in cases}
    assert found["federated", "ffa"].federation.strategy == "ffa"
    assert found["local", "ffa"].federation.strategy == "fedavg"  # alone there is nothing to fuse
    assert found["federated", "dora"].adapter.rank == 4
    assert found["local", "dora"].training.learning_rate == 0.5
    assert found["federated", "dora"].training.learning_rate == 1.0
    assert {c.config.federation.rounds for c in cases} == {4}


def test_defaults_follow_from_the_keys_of_all(tmp_path):
    """What the base does not give may follow from the grid."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "defaults"\narms = ["local", "federated", "federated-dp"]\n'
        "[grid]\nprivacy.epsilon = [8.0]\n[grid.way]\nadam = {}\n"
        'plain = { federation.server-optimizer = "none" }\n'
        'stack = { federation.strategy = "stack" }\nmedian = { federation.robust = "median" }\n'
    )
    made = {(case.arm, case.axes["way"]): case.config for case in sweep.read(path)}
    assert len(made) == 12

    def of(arm, way):
        federation = made[arm, way].federation
        optimizer, rate = federation.server_optimizer, federation.server_learning_rate
        return optimizer, rate, federation.weighting

    adam = from_flat({}).federation
    for arm in ("federated", "federated-dp"):
        assert of(arm, "adam") == ("adam", adam.server_learning_rate, "public-size")
        assert of(arm, "plain") == ("none", 1.0, "public-size")
        assert of(arm, "stack") == ("none", 1.0, "public-size")
        assert of(arm, "median") == ("adam", adam.server_learning_rate, "uniform")
    assert len({config.data for config in made.values()}) == 1  # one split
    assert of("local", "stack") == of("local", "adam")


def test_training_alone_has_nothing_of_the_federation(sweep_file):
    text = (
        'arms = ["local", "central", "federated"]\n[grid.way]\nplain = {}\n'
        'own = { federation.strategy = "own_rule:mean" }\n'
        'cut = { federation.robust = "median" }\n'
    )
    ways: dict[str, set[str]] = {}
    for case in sweep.read(sweep_file(text)):
        ways.setdefault(case.arm, set()).add(case.config.fingerprint())
    assert {arm: len(found) for arm, found in ways.items()} == {
        "local": 1,
        "central": 1,
        "federated": 3,
    }


def test_other_code_of_a_plug_in_is_another_cell(sweep_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = 'arms = ["federated"]\n[grid]\nfederation.strategy = ["own_rule:mean"]\n'
    path, names = sweep_file(text), []
    for version in (1, 2):
        code = f"def mean(this_round, updates):\n    return {version}\n"
        (tmp_path / "own_rule.py").write_text(code)
        sys.modules.pop("own_rule", None)  # as in another process
        made, _ = sweep.cells(sweep.read(path), KEY)
        names += made
    assert len(set(names)) == 2


def test_a_base_that_looks_at_one_institution_does_not_narrow_arms(sweep_file):
    text = f"{ALL_ARMS}\n[grid]\nseed = [1]"
    narrow = sweep.cells(sweep.read(sweep_file(text, **{"data.view": "only:Alpha"})), KEY)
    assert narrow == sweep.cells(sweep.read(sweep_file(text)), KEY)


def test_other_records_are_another_cell(sweep_file, complaints, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text(complaints.read_text())
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]', **{"data.source": str(mine)})
    before, _ = sweep.cells(sweep.read(path), KEY)
    mine.write_text(complaints.read_text().replace("Alpha", "Omega"))  # the same rows elsewhere
    records.forget()  # as another process would
    after, _ = sweep.cells(sweep.read(path), KEY)
    assert len(before) == len(after) == 1 and set(before) != set(after)


def test_the_name_of_a_cell_says_nothing_of_records_without_the_key_of_the_sweep(
    sweep_file, tmp_path
):
    """A model card has it: a digest of records would let others try out the last record."""
    path = sweep_file('arms = ["base"]\n[grid]\nseed = [1]')
    for name in ("one", "two"):
        assert invoke("sweep", path, "--out", tmp_path / name, "--engine", "inline").exit_code == 0
    (one,), (two,) = (
        [cell.name for cell in (tmp_path / name / "cells").iterdir()] for name in ("one", "two")
    )
    assert one[:-12] == two[:-12] and one != two
    key = tmp_path / "one" / cells.KEY
    assert key.stat().st_mode & 0o777 == 0o600
    assert one in sweep.cells(sweep.read(path), key.read_text().strip())[0]


@pytest.mark.parametrize("key", [None, "", "5a", "no key"])
def test_a_sweep_whose_key_is_missing_or_damaged_is_not_continued(sweep_file, tmp_path, key):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"
    out.mkdir()
    (out / results.MANIFEST).write_text("{}")
    if key is not None:
        (out / cells.KEY).write_text(key)
    said = invoke("sweep", path, "--out", out, "--resume")
    assert said.exit_code == 2 and cells.KEY in said.stderr and "another --out" in said.stderr
    assert (out / results.MANIFEST).read_text() == "{}"


def test_a_sweep_that_another_one_began_meanwhile_is_not_mixed_with_it(
    sweep_file, tmp_path, monkeypatch
):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"

    def meanwhile(*_):
        out.mkdir()
        (out / cells.KEY).write_text(KEY)
        return ""

    monkeypatch.setattr(cells.tracking, "begin_sweep", meanwhile)
    said = invoke("sweep", path, "--out", out, "--resume")
    assert said.exit_code == 2 and "another sweep began" in " ".join(said.stderr.split())
    assert not (out / results.MANIFEST).exists()


def test_another_adapter_to_start_from_is_another_cell(sweep_file, tmp_path):
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        (runs / name / "adapter").mkdir(parents=True)
        (runs / name / "adapter" / "adapter_model.safetensors").write_text(name)
    link = runs / "latest"

    def found():
        link.unlink(missing_ok=True)
        link.symlink_to(runs / "one")
        cases = sweep.read(path)
        link.unlink()
        link.symlink_to(runs / "two")  # a run that began meanwhile
        return sweep.cells(cases, KEY)[0]

    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]', **{"adapter.start": str(link)})
    (before,) = found().values()
    assert before.config.adapter.start == str(runs / "one")
    assert [*found()] == [before.name]
    (runs / "one" / "adapter" / "adapter_model.safetensors").write_text("three")
    assert before.name not in found()


def test_another_tokenizer_is_another_cell(sweep_file, monkeypatch):
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]')
    before, _ = sweep.cells(sweep.read(path), KEY)
    monkeypatch.setattr(records, "encoding", lambda config: "another")
    assert sweep.cells(sweep.read(path), KEY)[0].keys().isdisjoint(before)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (
            [0],
            {
                "central-dp": [0.81, 0.88],
                "federated-dp: local": [0.61, 0.68],
                "federated-dp: secure-aggregation": [0.71, 0.78],
            },
        ),
        (
            [0, 1],
            {
                "central-dp: count 0": [0.81, 0.88],
                "central-dp: count 1": [0.82, 0.89],
                "federated-dp: local, count 0": [0.61, 0.68],
                "federated-dp: local, count 1": [0.62, 0.69],
                "federated-dp: secure-aggregation, count 0": [0.71, 0.78],
                "federated-dp: secure-aggregation, count 1": [0.72, 0.79],
            },
        ),
    ],
)
def test_a_setting_that_does_not_change_an_arm_is_not_in_its_line_against_epsilon(
    monkeypatch, counts, expected
):
    drawn = {}
    monkeypatch.setattr(
        sweep_page.figures,
        "against_epsilon",
        lambda title, lines, levels: drawn.update((of, y) for of, _, y, _ in lines),
    )
    lines = [
        {
            "arm": arm,
            "privacy.trust": trust,
            "privacy.epsilon": epsilon,
            "count": count,
            "accuracy": accuracy + epsilon / 100 + count / 100,
            "accuracy_ci95": None,
            "same_as": "local" * (arm == "central-dp" and trust != "local"),
        }
        for arm, trust, accuracy in (
            ("central-dp", "local", 0.8),
            ("central-dp", "secure-aggregation", 0.8),
            ("federated-dp", "local", 0.6),
            ("federated-dp", "secure-aggregation", 0.7),
        )
        for count in counts
        for epsilon in (1.0, 8.0)
    ]
    axes = ["privacy.trust", "privacy.epsilon"] + ["count"] * (len(counts) > 1)
    sweep_page._privacy(lines, axes)
    assert {name: [round(y, 2) for y in ys] for name, ys in drawn.items()} == expected


def test_runs_stand_once_in_tables_and_bars(tmp_path, monkeypatch):
    cases = [
        {"arm": arm, "axes": {"method": method}, "seed": 1, "cells": {"": cell}}
        for arm, method, cell in (
            ("base", "lora", "b"),
            ("base", "dora", "b"),
            ("federated", "lora", "l"),
            ("federated", "dora", "d"),
        )
    ]
    (tmp_path / results.MANIFEST).write_text(json.dumps({"name": "x", "cases": cases}))
    for cell in "bld":
        result = {"accuracy": 0.5, "institutions": {}, "epsilon_max": "inf", "seconds": 1.0}
        save_cell(results.run_dir(tmp_path, cell), result)
    lines = summary(tmp_path)
    assert [line["same_as"] for line in lines] == ["", "lora", "", ""]
    pooled, _ = results.tables(lines, ["method"])
    assert [row[:2] for row in pooled[1:]] == [
        ["base", "lora"],
        ["federated", "lora"],
        ["federated", "dora"],
    ]
    monkeypatch.setattr(sweep_page.figures, "bars", lambda _, __, groups, **___: groups)
    (drawn,) = sweep_page._settings(lines, ["method"]).values()
    assert {arm: list(rows) for arm, rows in drawn.items()} == {
        "base": ["lora"],
        "federated": ["lora", "dora"],
    }


def test_a_cells_name_follows_from_what_it_computes_alone(sweep_file):
    one, _ = sweep.cells(sweep.read(sweep_file('arms = ["federated"]\n[grid]\nseed = [1, 2]')), KEY)
    text = 'arms = ["federated"]\n[grid]\nseed = [2, 1]\nengine.workers = [2]'
    other, _ = sweep.cells(sweep.read(sweep_file(text)), KEY)
    assert set(one) == set(other) and len(one) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('arms = ["federated"]\n[grid]\nadapter.rnk = [1]', ["adapter.rnk", "adapter.rank"]),
        ('arms = ["federated"]\nsets = 1\n[grid]\nseed = [1]', ["sets", "did you mean set"]),
        ('arms = ["federated"]\n[grid]', ["grid is empty"]),
        ('arms = ["federated"]\n[grid]\nseed = []', ["no value for seed"]),
        ('arms = ["federated"]\n[grid]\nseed = 1', ["seed = 1", "list"]),
        ('arms = ["federated"]\n[grid]\nseed = [1, 1]', ["twice"]),
        ('arms = ["federated"]', ["no grid"]),
        ("arms = []\n[grid]\nseed = [1]", ["arms is empty"]),
        ('arms = ["federatd"]\n[grid]\nseed = [1]', ["federatd", "federated"]),
        ('arms = ["federated"]\n[grid]\nadapter.rank = [0]', ["adapter.rank is 0", "at least 1"]),
        ('arms = ["local"]\n[grid]\nprivacy.epsilon = ["a"]', ["privacy.epsilon is 'a'"]),
        ('arms = ["federated"]\n[grid]\nrun-dir = ["x"]', ["run-dir", "--out"]),
        (
            'arms = ["local", "base"]\n[set.local]\ndata.partition = "iid"\n[grid]\nseed = [1]',
            ["'local'", "'base'", "cannot share a split", "data.partition"],
        ),
        (
            'arms = ["federated"]\n[set.federated]\nhome.epsilon = 2.0\n[grid]\nseed = [1]',
            ["[set.federated] has home.epsilon", "without DP", "federated-dp"],
        ),
        (
            'arms = ["local-dp"]\n[set.local-dp]\nhome.steps = 2\n[grid]\nseed = [1]',
            ["[set.local-dp] has home.steps", "only federated arms"],
        ),
        (
            'arms = ["federated-dp"]\n[grid]\nprivacy.epsilon = [inf]',
            ["federated-dp", "privacy.epsilon is inf"],
        ),
        ('arms = ["local"]\n[grid]\ndata.text = ["body"]', ["body"]),
        (
            'arms = ["federated"]\n[grid]\nadapter.rank = [2, 8]\n'
            "[grid.method]\ndora = { adapter.rank = 4 }",
            ["adapter.rank", "grid method", "one of them"],
        ),
        (
            'arms = ["federated"]\n[set.federated]\nadapter.rank = 4\n'
            "[grid]\nadapter.rank = [2, 8]",
            ["[set.federated]", "adapter.rank", "drop one"],
        ),
        (
            'arms = ["federated"]\n[grid.seconds]\nfew = { adapter.rank = 4 }',
            ["seconds", "column", "another name"],
        ),
        (
            'arms = ["federated"]\n[set.federated]\nadapter.rank = 4\n'
            "[grid.size]\nbig = { adapter.rank = 8 }",
            ["[set.federated]", "grid size 'big'", "drop one"],
        ),
        (
            'arms = ["federated"]\n[grid.gain]\nfew = { adapter.rank = 4 }',
            ["gain", "column", "another name"],
        ),
        ('arms = ["federated"]\n[grid.seed]\na = { seed = 1 }', ["seed", "list"]),
        (
            'arms = ["federated"]\n[set.federated]\nprivacy.epsilon = 3\n[grid]\nseed = [1]',
            ["[set.federated]", "privacy.epsilon", "federated-dp"],
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(sweep_file, tmp_path, text, words):
    out = tmp_path / "out"
    result = invoke("sweep", sweep_file(text), "--out", out)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not out.exists()


def test_over_a_thousand_cells_need_yes(sweep_file, tmp_path):
    text = f'arms = ["federated"]\n[grid]\nseed = {list(range(1001))}'
    result = invoke("sweep", sweep_file(text), "--out", tmp_path / "out")
    assert result.exit_code == 2 and "1,001 cells" in result.stderr and "hours" in result.stderr
    sweep.check_size(1000, 1.0)
    with pytest.raises(InputError, match="--yes"):
        sweep.check_size(1001, 7200.0)


@pytest.mark.parametrize(
    ("data", "shared"),
    [({}, 0.25), ({"data.test-fraction": 0.4}, 2 / 3), ({"data.test-source": "rows.csv"}, 0.0)],
)
def test_the_gain_and_its_interval_are_those_by_hand(tmp_path, data, shared):
    values = {"local": [0.5, 0.6, 0.7], "federated": [0.7, 0.9, 0.8]}
    cases = [
        {"arm": arm, "axes": {}, "seed": seed, "cells": {"": f"{arm}-{seed}"}}
        for arm in values
        for seed in range(3)
    ]
    (tmp_path / results.MANIFEST).write_text(json.dumps({"name": "x", "cases": cases}))
    for arm, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            result = {"accuracy": accuracy, "macro_f1": 0.5, "institutions": {"A": accuracy - 0.1}}
            result |= {"epsilon_max": "inf", "seconds": 2.0}
            save_cell(results.run_dir(tmp_path, f"{arm}-{seed}"), result, **data)
    line = next(
        x for x in summary(tmp_path) if (x["arm"], x["institution"]) == ("federated", results.ALL)
    )
    assert line["accuracy"] == pytest.approx(0.8)
    # t(0.975, 2) = 4.303, s = 0.1, three seeds, and held-out over training records
    half = 4.3027 * 0.1 * math.sqrt(1 / 3 + shared)
    assert line["accuracy_ci95"] == pytest.approx(half, rel=1e-4)
    assert line["gain_over_local"] == pytest.approx(0.2)  # 0.2, 0.3, 0.1
    assert line["gain_over_local_ci95"] == pytest.approx(half, rel=1e-4)
    assert line["worst_accuracy"] == pytest.approx(0.7)
    assert line.keys() == set(results.COLUMNS)
    assert line["seconds"] == 2.0 and line["epsilon"] == math.inf


def joined_sweep(out):
    """A made-up sweep: two settings with two seeds each; two institutions train at home."""
    cases = [
        {
            "arm": "federated-dp",
            "axes": {"holdings": holdings, "privacy.epsilon": 8.0},
            "seed": seed,
            "cells": {"": f"{holdings}-{seed}"},
        }
        for holdings in ("few", "many")
        for seed in (1, 2)
    ]
    out.mkdir()
    about = {"name": "x", "command": "fedlora sweep x.toml", "cases": cases}
    (out / results.MANIFEST).write_text(json.dumps(about))
    for case in cases:
        names = ("A", "B") if case["axes"]["holdings"] == "few" else ("A", "B", "C", "D")
        result = {"accuracy": 0.5, "macro_f1": 0.5, "institutions": dict.fromkeys(names, 0.5)}
        result |= {"epsilon_max": 8.0, "delta": 1e-5, "seconds": 2.0}
        result["joining"] = compared(names[:2], better=4 + 2 * case["seed"])
        save_cell(results.run_dir(out, case["cells"][""]), result)
    return out


def test_a_sweep_has_the_three_models_and_the_gain_of_its_cells(tmp_path):
    out = joined_sweep(tmp_path / "sweep")
    line = summary(out)[0]
    assert set(line) == {*results.COLUMNS, *results.JOINING_COLUMNS, "holdings", "privacy.epsilon"}
    # alone is right on 16 and 14 of 22 rows, own on 20, shared on 11
    assert line["alone"] == pytest.approx(15 / 22) and line["own"] == pytest.approx(20 / 22)
    assert line["shared"] == pytest.approx(0.5) and line["gain"] == pytest.approx(5 / 22)
    # t(0.975, 1) = 12.706, s = sqrt(2) / 22, two seeds, a fifth of the records held out
    half = 12.706 * math.sqrt(2) / 22 * math.sqrt(1 / 2 + 0.25)
    assert line["gain_ci95"] == pytest.approx(half, rel=1e-4)
    assert (line["institutions"], line["records"]) == (2, 60)  # 40 and 80 records
    many = next(x for x in summary(out) if x["holdings"] == "many")
    assert (many["institutions"], many["records"]) == (4, 60)  # four train, two of them at home
    beta = next(x for x in summary(out) if x["institution"] == "B")
    assert beta["gain"] == pytest.approx(5 / 22) and beta["records"] == 80
    results.write(out)
    with (out / "results.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["gain"]) == line["gain"] and float(first["own"]) == line["own"]
    text = (out / "results.md").read_text()
    assert "own minus alone, in points" in text and "+22.7 ± 70.7" in text
    own_f1, alone_f1 = (
        [compared(("A", "B"), better=4 + 2 * seed)[model]["macro_f1"] for seed in (1, 2)]
        for model in ("own", "alone")
    )
    assert line["own_macro_f1"] == pytest.approx(sum(own_f1) / 2)
    assert line["alone_macro_f1"] == pytest.approx(sum(alone_f1) / 2)
    assert line["gain_shared"] == pytest.approx(11 / 22 - 15 / 22)
    assert line["gain_macro_f1"] == pytest.approx((sum(own_f1) - sum(alone_f1)) / 2)
    assert line["gain_macro_f1"] != pytest.approx(line["gain"]) and beta["gain_macro_f1"] is None


def test_a_line_counts_the_seeds_behind_its_figures(tmp_path):
    """A cell whose institutions all failed at home has no gain; an institution may be missing."""
    out = joined_sweep(tmp_path / "sweep")
    assert {line["seeds"] for line in summary(out)} == {2}
    about = results.manifest(out)
    file = results.run_dir(out, about["cases"][0]["cells"][""]) / "result.json"
    result = json.loads(file.read_text())
    result["joining"] = {"not_compared": {}}
    del result["institutions"]["B"]
    file.write_text(json.dumps(result))
    of = {"arm": about["cases"][0]["arm"], **about["cases"][0]["axes"]}
    lines = [x for x in summary(out) if of.items() <= x.items()]
    assert {x["institution"]: x["seeds"] for x in lines} == {results.ALL: 1, "A": 1, "B": 1}
    result["joining"] = compared(["B"], better=6)
    file.write_text(json.dumps(result))
    lines = [x for x in summary(out) if of.items() <= x.items()]
    assert {x["institution"]: x["seeds"] for x in lines} == {results.ALL: 2, "A": 1, "B": 1}


def test_institutions_that_could_not_be_compared_are_counted(tmp_path):
    out = joined_sweep(tmp_path / "sweep")
    assert "not compared" not in results.tables(summary(out), [])[0][0]
    for cell in ("few-1", "few-2"):
        file = results.run_dir(out, cell) / "result.json"
        result = json.loads(file.read_text())
        result["joining"]["not_compared"] = {"C": "bad-configuration"}
        file.write_text(json.dumps(result))
    lines = summary(out)
    assert [x["not_compared"] for x in lines if x["institution"] == results.ALL] == [2, 0]
    head, *rows = results.tables(lines, [])[0]
    assert [row[head.index("not compared")] for row in rows] == ["2", ""]
    result["joining"] = {"not_compared": {"A": "timeout", "B": "timeout"}}  # nothing is left
    for cell, counts in (("few-2", [3, 0]), ("few-1", [4, 0])):
        (results.run_dir(out, cell) / "result.json").write_text(json.dumps(result))
        lines = [x for x in summary(out) if x["institution"] == results.ALL]
        assert [x["not_compared"] for x in lines] == counts
        assert ("gain" in lines[0]) == (cell == "few-2")
        said = conclusion.of(lines[:1], ["holdings"]).note
        assert said.startswith("At most one seed") == (cell == "few-2")
    assert "Not compared: institutions of all seeds" in results.caption(lines[:1])
    one = summary(joined_sweep(tmp_path / "one"))[0]
    one |= {"not_compared": 1, "gain_ci95": None, "accuracy_ci95": None}  # one seed was run
    assert conclusion.of([one], ["holdings"]).note.startswith("One seed cannot show")


def test_institutions_that_train_together_are_counted_also_without_held_out_rows(tmp_path):
    out = joined_sweep(tmp_path / "sweep")
    for cell in (out / "cells").iterdir():
        result = json.loads((cell / "result.json").read_text())
        (cell / "result.json").write_text(json.dumps(result | {"population": 10}))
    assert summary(out)[0]["institutions"] == 10


def save_sweep(out, cells):
    """Write a sweep of one setting: arm -> the result of each of its seeds."""
    cases = [
        {"arm": arm, "axes": {}, "seed": seed, "cells": {"": f"{arm}-{seed}"}}
        for arm, found in cells.items()
        for seed in range(len(found))
    ]
    out.mkdir(exist_ok=True)
    about = {"name": "x", "command": "fedlora sweep x.toml", "cases": cases}
    (out / results.MANIFEST).write_text(json.dumps(about))
    for case in cases:
        (name,) = case["cells"].values()
        result = {"institutions": {}, "epsilon_max": "inf", "seconds": 1.0}
        result |= cells[case["arm"]][case["seed"]]
        save_cell(results.run_dir(out, name), result)
    return out


def test_an_institution_named_all_keeps_its_figures(tmp_path):
    (name,) = file_names(["all"])
    result = {"accuracy": 0.75, "institutions": {name: 0.9, "B": 0.6}}
    lines = summary(save_sweep(tmp_path / "sweep", {"federated": [result]}))
    assert [x["accuracy"] for x in lines] == [0.75, 0.6, 0.9]
    assert [x["institution"] for x in lines if x["institution"] != results.ALL] == ["B", "all"]
    assert file_names([results.ALL])[results.ALL] != results.ALL


def test_a_gain_in_exact_matches_is_not_one_against_an_accuracy(tmp_path):
    """Local answers of few kinds have an accuracy, too; those of the federation have none."""
    answers = {"token_loss": 1.0, "generated": 200}
    local = answers | {"exact_match": 0.4, "accuracy": 0.6, "macro_f1": 0.5}
    cells = {"local": [local] * 2, "federated": [answers | {"exact_match": 0.5}] * 2}
    lines = summary(save_sweep(tmp_path / "sweep", cells))
    assert [x["accuracy"] for x in lines] == [0.4, 0.5]
    assert lines[1]["gain_over_local"] == pytest.approx(0.1)
    for generated in (True, False):
        words = sweep_page._words(
            ["local"], [], [1], 0, generated=generated, as_many_steps=not generated
        )
        assert ("the same number of steps" in words[0]) == (not generated)
        assert ("on the same held-out rows" in words[0]) != generated


@pytest.mark.parametrize("budgets", [{}, {"privacy.epsilon": [1.0, 8.0]}])
@pytest.mark.parametrize("rounds", [2, 3])
def test_a_page_says_whether_arms_took_as_many_steps(sweep_file, budgets, rounds):
    """An arm without DP has a budget of its own, at which no other arm runs."""
    grid = "".join(f"{key} = {value}\n" for key, value in budgets.items())
    text = f'arms = ["federated", "federated-dp"]\n[set.federated]\nfederation.rounds = {rounds}\n'
    cases = sweep.read(sweep_file(f"{text}[grid]\nseed = [1, 2]\n{grid}"))
    about = {
        "cases": [
            {"arm": c.arm, "axes": c.axes, "seed": c.config.seed, "cells": {"": str(number)}}
            for number, c in enumerate(cases)
        ]
    }
    configs = {str(number): c.config for number, c in enumerate(cases)}
    assert sweep_page._as_many_steps(about, configs) == (rounds == 2)


def test_a_page_says_of_which_models_at_home_a_promise_is(sweep_file):
    """Also names the budget of those that are drawn, not of another arm."""
    text = 'arms = ["local-dp", "federated", "federated-dp"]\n[set]\nhome.epsilon = 8.0\n'
    text += "[set.local-dp]\nprivacy.epsilon = 1.0\n[grid]\nseed = [1]"
    cases = sweep.read(sweep_file(text, **{"home.method": "fine-tune"}))
    configs = {c.arm: c.config for c in cases}
    about = {"cases": [{"arm": c.arm, "axes": {}, "cells": {"": c.arm}} for c in cases]}
    line = {"gain": 0.1, "gain_ci95": None, "records": 60, "institutions": 4, "same_as": ""}
    lines = [line | {"arm": "federated-dp", "institution": results.ALL, "epsilon": 8.0}]
    section = sweep_page._joining(lines, configs, about)
    first, second = section.words[1:3]
    assert first.startswith("In federated with home.epsilon inf: alone and own have no")
    assert second.startswith("In federated-dp with home.epsilon 8: ")
    del configs["federated"]
    assert not sweep_page._joining(lines, configs, about).words[1].startswith("In ")


def test_a_gain_counts_its_own_seeds_and_no_file_shows_them(tmp_path):
    cells = {
        arm: [{"accuracy": 0.5 + seed / 10} for seed in range(seeds)]
        for arm, seeds in (("local", 4), ("local-dp", 3), ("federated-dp", 4))
    }
    out = save_sweep(tmp_path / "sweep", cells)
    line = next(x for x in summary(out) if x["arm"] == "federated-dp")
    assert line["seeds"] == 3
    assert (line["gain_over_local_n"], line["gain_over_local_dp_n"]) == (4, 3)
    results.write(out)
    assert "_n" not in (out / "results.csv").read_text().splitlines()[0].replace('"', "")


def test_results_of_an_earlier_grid_go_when_no_case_of_the_new_one_is_complete(tmp_path):
    out = save_sweep(tmp_path / "sweep", {"federated": [{"accuracy": 0.5}]})
    results.write(out)
    (out / "report.html").write_text("of the earlier grid")
    about = results.manifest(out)
    about["cases"][0]["cells"] = {"": "not-run"}
    (out / results.MANIFEST).write_text(json.dumps(about))
    results.write(out)
    assert {path.name for path in out.iterdir()} == {results.MANIFEST, "cells"}


def test_a_sweep_draws_the_gain_against_the_records_held(tmp_path):
    lines = [x for x in summary(joined_sweep(tmp_path / "sweep")) if x["gain"] is not None]
    pooled = [x for x in lines if x["institution"] == results.ALL]
    free = [x | {"arm": "federated", "privacy.epsilon": "inf"} for x in pooled]
    ((title, svg),) = joining_page.by_records([*free, *pooled], "privacy.epsilon", 8.0).items()
    assert title == "Gain of joining by records held"
    assert "epsilon 8, 2 institutions of 60 records: +22.7" in svg
    assert "no DP, 4 institutions of 60 records: +22.7" in svg
    assert svg.index(">epsilon 8</text>") < svg.index(">no DP</text>")  # panels
    assert (
        joining_page.by_records([x | {"gain": None} for x in pooled], "privacy.epsilon", 8.0) == {}
    )
    assert joining_page.by_records([free[0], pooled[0]], "privacy.epsilon", 8.0) == {}
    many = [pooled[0] | {"institutions": 2 + number} for number in range(9)]
    (title,) = joining_page.by_records(many, "privacy.epsilon", 8.0)
    assert title.endswith("(the 8 smallest of 9 numbers of institutions)")
    spent = [x | {"epsilon": 7.994 + number / 1000} for number, x in enumerate(pooled)]
    without_axis = [{k: v for k, v in x.items() if k != "privacy.epsilon"} for x in spent]
    (svg,) = joining_page.by_records(without_axis, "privacy.epsilon", 8.0).values()
    assert svg.count(">epsilon 8</text>") == 1 and "epsilon 7.99" not in svg


def test_seeds_that_agree_by_chance_are_no_surer_than_their_runs(tmp_path):
    out = joined_sweep(tmp_path / "sweep")
    for name in ("few-1", "few-2"):
        place = results.run_dir(out, name)
        result = json.loads((place / "result.json").read_text())
        result["joining"]["gain"] |= {"mean": 0.2, "low": 0.1, "high": 0.4}
        result["joining"]["institutions"]["A"] |= {"gain": 0.2, "low": 0.0, "high": 0.4}
        (place / "result.json").write_text(json.dumps(result))
    everyone, alpha = summary(out)[:2]
    assert everyone["gain_ci95"] == pytest.approx(0.15 * math.sqrt(1 / 2 + 0.25))
    assert (alpha["institution"], alpha["gain"]) == ("A", pytest.approx(0.2))
    assert alpha["gain_ci95"] == pytest.approx(0.2 * math.sqrt(1 / 2 + 0.25))
    test_file = from_flat({"data.source": "/data/a.csv", "data.test-source": "/data/b.csv"})
    for cell in (out / "cells").iterdir():  # other rows are no part of it: one test file
        (cell / "config.toml").write_text(test_file.to_toml())
    assert summary(out)[0]["gain_ci95"] == 0


@pytest.mark.parametrize(
    ("key", "value", "drawn"),
    [
        ("data.max-records", 160, True),
        ("home.institutions", 2, True),
        ("seed", 9, True),
        ("training.max-length", 40, False),
        ("data.source", "/elsewhere/../data/a.csv", True),
        ("data.source", "/data/b.csv", False),
    ],
)
def test_the_gain_is_drawn_against_records_if_nothing_else_varies(tmp_path, key, value, drawn):
    out = joined_sweep(tmp_path / "sweep")
    for number, cell in enumerate(sorted((out / "cells").iterdir())):
        made = from_flat({"data.source": "/data/a.csv"}).replace({key: value} if number else {})
        (cell / "config.toml").write_text(made.to_toml())
    pooled = [x for x in summary(out) if x["institution"] == results.ALL]
    found = results.read(out)
    section = sweep_page._joining(pooled, found.configs, found.about)
    assert bool(section.figures) == drawn and section.words


def test_the_conclusion_of_a_sweep_with_models_at_home_is_about_joining(tmp_path):
    pooled = summary(joined_sweep(tmp_path / "sweep"))
    pooled = [x for x in pooled if x["institution"] == results.ALL]
    values = [(0.05, 0.04), (0.03, 0.04), (0.02, 0.03), (-0.04, 0.03)]
    assert pooled[0]["classes_with_few_texts"] == 1
    pooled[0]["classes_with_few_texts"] = 0
    lines = [pooled[0] | {"seeds": 3, "gain": g, "gain_ci95": half} for g, half in values]
    free = lines[0] | {"arm": "federated", "gain": 0.09, "gain_ci95": 0.01}
    found = conclusion.of([*lines, free], ["holdings"])
    assert "Under differential privacy in 1 of 4 settings, and in 1 it costs" in found.note
    assert "Without it in 1 of 1 settings, and in 0 it costs" in found.note
    assert "Largest gain: +9.0 ± 1.0 points, federated (few)" in " ".join(found.words)
    assert "Smallest gain: -4.0 ± 3.0 points" in " ".join(found.words)
    assert found.caution and not found.bad  # one setting costs
    rarer = {"gain_macro_f1": -0.06, "gain_macro_f1_ci95": 0.05}
    assert not conclusion.of([*lines[:2], free], ["holdings"]).caution
    assert conclusion.of([*lines[:2], free | rarer], ["holdings"]).caution
    # 1 of 3 can be chance: of 3 with 0.025 each, none pays in 92.7 % only, and two in 0.2 %
    assert conclusion.of([*lines[:3], free], ["holdings"]).caution
    assert not conclusion.of([lines[0], lines[0], lines[2]], ["holdings"]).caution
    assert conclusion.of([*lines[1:3], free], ["holdings"]).caution  # it pays without DP only
    once = conclusion.of([*lines[1:], free], ["holdings"])  # one cost of three can be chance too
    assert once.caution and not once.bad
    assert conclusion.of([lines[3], lines[3], lines[1]], ["holdings"]).bad
    assert "pays: Without differential privacy in 1 of 1" in conclusion.of([free], []).note
    rare = [(0.02, 0.01), (0.02, 0.03), (-0.06, 0.05), (-0.02, 0.01), (0.0, 0.1)]
    lines_and_rare = zip([*lines, free], rare, strict=True)
    both = [x | {"gain_macro_f1": g, "gain_macro_f1_ci95": half} for x, (g, half) in lines_and_rare]
    said = " ".join(conclusion.of(both, ["holdings"]).words)
    assert "each class alike, joining pays in 1 of 5 settings and costs in 2." in said
    both[0]["classes_with_few_texts"] = both[2]["classes_with_few_texts"] = 1
    said = " ".join(conclusion.of(both, ["holdings"]).words)
    assert "joining pays in 0 of 3 settings and costs in 1. In 2 of the settings a class" in said
    assert conclusion.of(lines[3:], ["holdings"]).bad
    assert conclusion.of(lines[2:3], ["holdings"]).caution
    assert "Too few seeds" in " ".join(conclusion.of([lines[0] | {"seeds": 2}], []).words)
    one = conclusion.of([lines[0] | {"seeds": 1, "gain_ci95": None}], [])
    assert one.note.startswith("One seed cannot show") and one.caution


@pytest.mark.parametrize(
    ("settings", "gain", "start"),
    [
        (1, 0.05, "Joining pays"),
        (4, 0.05, "Joining makes no difference"),  # within 0.055
        (4, 0.12, "Joining pays"),
        (4, -0.12, "Joining does not pay"),
    ],
)
def test_the_best_of_several_settings_has_a_wider_interval(settings, gain, start):
    """Of 10 seeds, where another figure has 3: Student's t at 1 - 0.025 / 4 is 3.1109, at 0.975 it
    is 2.2622 (tables).
    """
    best = {
        "arm": "federated-dp", "axis": 0, "seeds": 3, "accuracy": 0.8, "same_as": "",
        "gain_over_local": gain, "gain_over_local_ci95": 0.04, "gain_over_local_n": 10,
    }  # fmt: skip
    others = [best | {"axis": i, "accuracy": 0.7} for i in range(1, settings)]
    same = best | {"axis": 9, "same_as": "axis 0"}  # the same runs: no further choice
    found = conclusion.of([best, *others, same], ["axis"])
    assert found.note.startswith(start)
    half = 4.0 * (3.1109 / 2.2622 if settings > 1 else 1)
    assert f"95 % interval ± {half:.1f}" in found.note
    allowed = f"; its level allows for the choice among {settings} settings." in found.note
    assert allowed == (settings > 1)


def test_arms_of_one_institution_do_not_train_at_home(sweep_file):
    text = f"{ALL_ARMS}\n[grid]\nseed = [1]\nhome.steps = [8, 16]"
    cases = sweep.read(sweep_file(text, **{"home.method": "interpolate"}))
    made, needed = sweep.cells(cases, KEY)
    for case, names in zip(cases, needed, strict=True):
        home = "interpolate" if case.arm.startswith("federated") else "none"
        assert {made[name].config.home.method for name in names.values()} == {home}
    cells = [names for case, names in zip(cases, needed, strict=True) if case.arm == "central"]
    assert len(cells) == 2 and cells[0] == cells[1]  # steps at home have no effect there


TRUST = """
arms = ["central", "central-dp", "federated", "federated-dp"]
[set]
federation.weighting = "public-size"
privacy.honest = 3
privacy.colluding = 1
[grid]
privacy.trust = ["local", "secure-aggregation"]
privacy.epsilon = [1.0, 8.0]
"""


def test_only_a_federation_under_dp_has_a_trust(sweep_file):
    cases = sweep.read(sweep_file(TRUST))
    made, needed = sweep.cells(cases, KEY)
    shared = {case.arm for case in cases if case.config.privacy.shares_noise}
    assert shared == {"federated-dp"}
    cells = [
        {names[""] for case, names in zip(cases, needed, strict=True) if case.arm == arm}
        for arm in ("central", "central-dp", "federated", "federated-dp")
    ]
    assert [len(names) for names in cells] == [1, 2, 1, 4] and len(made) == 8


@pytest.mark.slow
def test_a_sweep_runs_the_same_arms_under_both_trusts(sweep_file, tmp_path):
    path = sweep_file(TRUST.replace("1.0, 8.0", "8.0"))
    command = ("sweep", path, "--out", tmp_path / "out", "--jobs", 2, "--engine", "inline")
    result = invoke(*command, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["cells"], said["done"], said["failed"]) == (5, 5, {})
    pooled = [x for x in said["results"] if x["institution"] == results.ALL]
    pooled = [x for x in pooled if x["arm"].endswith("-dp")]
    assert {x["privacy.trust"] for x in pooled} == {"local", "secure-aggregation"}
    assert all(0 < x["epsilon"] <= 8 for x in pooled)


@pytest.mark.slow
def test_a_sweep_runs_its_arms_and_never_a_finished_cell_again(sweep_file, tmp_path):
    path, out = sweep_file(f"{ALL_ARMS}\n[grid]\nseed = [1]"), tmp_path / "out"
    command = ("sweep", path, "--out", out, "--jobs", 2, "--engine", "inline", "--json")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["cells"], said["done"], said["failed"]) == (13, 13, {})
    pooled = {x["arm"]: x for x in said["results"] if x["institution"] == results.ALL}
    assert list(pooled) == list(sweep.ARMS)
    assert pooled["federated-dp"]["seeds"] == 1 and 0 < pooled["federated-dp"]["epsilon"] <= 8
    assert pooled["federated"]["gain_over_local"] is not None
    assert pooled["base"]["bytes"] == 0 < pooled["federated"]["bytes"]
    each = [x for x in said["results"] if x["arm"] == "local" and x["institution"] != results.ALL]
    assert [x["institution"] for x in each] == ["Alpha", "Beta", "Delta", "Gamma"]
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(said["results"])
    assert pyarrow.parquet.read_table(out / "results.parquet").num_rows == len(said["results"])
    assert "federated-dp" in (out / "results.md").read_text()
    assert (out / "report.html").exists()

    refused = invoke(*command)
    assert refused.exit_code == 2 and "--resume" in refused.stderr
    again = json.loads(invoke(*command, "--resume").stdout)
    assert (again["before"], again["done"]) == (13, 0)

    one = results.run_dir(out, results.manifest(out)["cases"][0]["cells"][""]) / "environment.json"
    found = json.loads(one.read_text())
    one.write_text(json.dumps(found | {"git_sha": "f" * 40, "git_dirty": False}))
    told = " ".join(invoke(*command[:-1], "--resume").output.split())
    assert f"other code (commit {'f' * 12}, and this is" in told and "kept: remove" in told
    assert again["results"] == said["results"]


def test_a_cell_whose_results_cannot_be_read_is_named_and_the_exit_code_tells_it(
    sweep_file, tmp_path
):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"
    (cell,) = sweep.cells(sweep.read(path), KEY)[0]
    directory = results.run_dir(out, cell)
    directory.mkdir(parents=True)
    (out / results.MANIFEST).write_text('{"name": "sweep", "command": "", "cases": []}')
    (out / cells.KEY).write_text(KEY)
    (directory / "result.json").write_text("{")
    (directory / "environment.json").write_text('{"git_sha": "f", "git_dirty": false}')
    said = invoke("sweep", path, "--out", out, "--resume")
    assert said.exit_code == 1
    assert f"cell {cell} failed: its result.json cannot be read" in said.stderr


@pytest.mark.parametrize("file", ["environment.json", "config.toml", "rounds.jsonl"])
def test_a_complete_cell_without_code_settings_or_rounds_counts_in_no_mean_and_is_named(
    sweep_file, tmp_path, file
):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"
    (cell,) = sweep.cells(sweep.read(path), KEY)[0]
    save_cell(results.run_dir(out, cell), {"accuracy": 1.0})
    (results.run_dir(out, cell) / file).write_text("{\n")
    (out / results.MANIFEST).write_text('{"name": "sweep", "command": "", "cases": []}')
    (out / cells.KEY).write_text(KEY)
    said = invoke("sweep", path, "--out", out, "--resume")
    assert said.exit_code == 1
    assert f"cell {cell} failed: its {file} cannot be read" in said.stderr
    assert summary(out) == []


def test_a_begun_cell_of_other_code_starts_anew(tmp_path):
    """Its rounds would be of two codes; one of this code goes on."""
    made = []
    now = run_files.revision()
    for name, about in (
        ("old", {**now, "git_sha": "e" * 40, "git_dirty": False}),
        ("edited", {**now, "code": "e" * 64}),
        ("new", now),
        ("none", None),
    ):
        config = from_flat({})
        made.append(sweep.Cell(name=name, config=config, institutions=4, cost=1.0))
        folder = results.run_dir(tmp_path, name)
        folder.mkdir(parents=True)
        if about:
            (folder / "environment.json").write_text(json.dumps(about))
    assert cells._drop_begun(tmp_path, made) == {"old", "edited"}
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == ["new", "none"]


def test_a_kill_while_a_begun_cell_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    made = [sweep.Cell(name="old", config=from_flat({}), institutions=4, cost=1.0)]
    folder = results.run_dir(tmp_path, "old")
    folder.mkdir(parents=True)
    about = {**run_files.revision(), "code": "e" * 64}
    (folder / "environment.json").write_text(json.dumps(about))

    def killed(path):
        (path / "environment.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells.shutil, "rmtree", killed)
        cells._drop_begun(tmp_path, made)
    assert not folder.exists()
    assert cells._drop_begun(tmp_path, made) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_full_disk_ends_a_sweep_in_one_line(sweep_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells, "_write_manifest", full)
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]')
    said = invoke("sweep", path, "--out", tmp_path / "out")
    assert said.exit_code == 1 and len(said.stderr.splitlines()) == 1
    assert "No space left on device; finished cells, if any, are kept (--resume)" in said.stderr


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        ("warning: rare-classes\nerror: no such file\n", 2, "no such file (see "),
        ("warning: rare-classes\n", -9, "it was ended by SIGKILL, which is what Linux sends"),
        ("a line\n", 3, "it ended with exit code 3 (see "),
        ("", -11, "it was ended by SIGSEGV (see "),
    ],
)
def test_the_reason_of_a_failed_cell_is_its_error_or_how_it_ended(tmp_path, log, code, reason):
    file = tmp_path / "cell.txt"
    file.write_text(log)
    said = cells._reason(file, code)
    assert said.startswith(reason) and str(file) in said
    assert ("rare-classes" in said) == (code == -9)


def test_a_sweep_whose_tracker_fails_leaves_nothing_behind(sweep_file, tmp_path, monkeypatch):
    def unreachable(*_):
        raise InputError("tracking.mlflow is 'x', but nothing can be logged there")

    monkeypatch.setattr(cells.tracking, "begin_sweep", unreachable)
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"
    result = invoke("sweep", path, "--out", out)
    assert result.exit_code == 2 and "nothing can be logged" in result.stderr
    assert not out.exists()


def test_of_two_sweeps_that_start_at_once_in_one_directory_the_second_is_refused(
    sweep_file, tmp_path, monkeypatch
):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]'), tmp_path / "out"

    def meanwhile(*_):  # the other has come first while records were split
        out.mkdir()
        (out / cells.LOCK).touch()
        (out / results.MANIFEST).write_text("{}")
        return ""

    monkeypatch.setattr(cells.tracking, "begin_sweep", meanwhile)
    result = invoke("sweep", path, "--out", out)
    assert result.exit_code == 2 and "holds a sweep" in result.stderr
    assert (out / results.MANIFEST).read_text() == "{}"


def test_the_arm_base_keeps_what_set_accepts_and_tracks(sweep_file):
    text = 'arms = ["base", "federated"]\n[set]\naccept = ["labels"]\n'
    text += 'tracking.mlflow = "sqlite:///t.db"\nengine.threads = 2\n[grid]\nseed = [1]'
    for case in sweep.read(sweep_file(text)):
        config = case.config
        assert config.accept == ("labels",) and config.engine.threads == 2
        assert config.tracking.mlflow == "sqlite:///t.db"


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_the_rest_goes_on(sweep_file, tmp_path):
    text = 'arms = ["federated"]\n[grid]\nadapter.target-modules = [["query"], ["nope"]]'
    out = tmp_path / "out"
    result = invoke("sweep", sweep_file(text), "--out", out, "--engine", "inline", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["cells"], said["done"]) == (2, 1)
    assert "nope" in next(iter(said["failed"].values())) and "nope" in result.stderr
    pooled = [x for x in said["results"] if x["institution"] == results.ALL]
    assert [x["adapter.target-modules"] for x in pooled] == ["query"]


def run_cells(path, out, execute):
    """Run the cells of a new sweep one after the other, each by ``execute`` in its process."""
    return cells.run(
        path,
        out,
        jobs=1,
        resume=False,
        yes=False,
        engine="inline",
        execute=execute,
        console=Terminal(quiet=True),
    )


def observed(arguments):
    """`fedlora` in the process of a cell; notes the models alone before and after."""
    directory = Path(os.environ[alone_models.DIRECTORY])

    def kept():
        return {file.name: file.stat().st_ino for file in directory.glob("*")}

    before = kept()
    try:
        execute(arguments)
    finally:
        note = json.dumps([before, kept()])
        Path(arguments[-1]).parent.joinpath(f"{time.time_ns()}.note").write_text(note)


@pytest.mark.slow
def test_the_cells_of_one_call_share_models_alone(sweep_file, tmp_path):
    """A cell that trains a model alone writes its file anew; the second and third write none."""
    text = 'arms = ["federated", "federated-dp"]\n[grid]\nprivacy.epsilon = [8.0, 4.0, inf]'
    out, keys = tmp_path / "out", {"home.method": "interpolate", "home.steps": 4}
    done = run_cells(sweep_file(text, **keys), out, observed)
    assert (done["done"], done["failed"]) == (3, {})
    first, *others = [json.loads(file.read_text()) for file in sorted(out.glob("cells/*.note"))]
    assert first[0] == {} and len(first[1]) == 4 and others == [[first[1], first[1]]] * 2
    assert not (out / cells.ALONE_MODELS).exists()
    lines = [x for x in done["results"] if x["institution"] == results.ALL]
    assert len({x["alone"] for x in lines}) == 1 and lines[0]["alone"] is not None


def test_models_alone_of_an_interrupted_call_stay_unless_of_other_code(tmp_path, monkeypatch):
    kept = cells._alone_models(tmp_path)
    kept.mkdir(parents=True)
    (kept / "one").touch()
    assert cells._alone_models(tmp_path) == kept and (kept / "one").exists()
    monkeypatch.setattr(cells, "environment", lambda: {"code": "other", "command": ["x"]})
    other = cells._alone_models(tmp_path)
    assert other != kept and not kept.exists()
    monkeypatch.setattr(cells, "environment", lambda: {"code": "other", "command": ["y"]})
    assert cells._alone_models(tmp_path) == other


def fails_at_four(arguments):
    """`fedlora` in the process of a cell; the cell of epsilon 4 fails."""
    if "epsilon-4" in arguments[-1]:
        sys.exit(1)
    execute(arguments)


@pytest.mark.slow
def test_a_sweep_with_a_failed_cell_keeps_its_models_alone(sweep_file, tmp_path):
    text = 'arms = ["federated-dp"]\n[grid]\nprivacy.epsilon = [8.0, 4.0]'
    out, keys = tmp_path / "out", {"home.method": "interpolate", "home.steps": 4}
    done = run_cells(sweep_file(text, **keys), out, fails_at_four)
    assert done["done"] == 1 and len(done["failed"]) == 1
    (kept,) = (out / cells.ALONE_MODELS).iterdir()
    assert len(list(kept.glob("*.safetensors"))) == 4


def test_a_cell_waits_while_another_may_train_its_models_alone(tiny_config):
    def cell(name, **values):
        return sweep.Cell(name=name, config=tiny_config(**values), institutions=4, cost=1.0)

    one, two = cell("a", **{"privacy.epsilon": 1.0}), cell("b", **{"privacy.epsilon": 8.0})
    other = cell("c", seed=5)
    assert cells._next([one, two, other], []) is one
    assert cells._next([two, other], [one]) is other
    assert cells._next([two], [one]) is two


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(sweep_file, tmp_path):
    path, out = sweep_file('arms = ["federated"]\n[grid]\nseed = [1, 2]'), tmp_path / "out"
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--out", str(out)]
    command += ["--engine", "inline", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/result.json")}
    assert first
    result = invoke(*command[3:], "--resume")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["before"] >= 1 and said["before"] + said["done"] == 2
    assert {p: p.stat().st_mtime_ns for p in first} == first


@pytest.mark.slow
def test_a_cell_that_was_killed_midway_goes_on_from_its_last_round(sweep_file, tmp_path):
    text, out = 'arms = ["federated"]\n[grid]\nseed = [1]', tmp_path / "out"
    path = sweep_file(text, **{"federation.rounds": 60})
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--out", str(out)]
    command += ["--engine", "inline", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    found: list[str] = []
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        found = [line for p in out.glob("cells/*/rounds.jsonl") for line in p.open()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(out.glob("cells/*/result.json"))
    result = invoke(*command[3:], "--resume")
    assert result.exit_code == 0, result.output
    (file,) = out.glob("cells/*/rounds.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 60 and lines[0] == found[0]  # its seconds are those of the first try


def test_a_directory_with_other_files_is_refused(sweep_file, tmp_path):
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    result = invoke("sweep", path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "other files" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, -9)])
def test_a_sweep_that_ends_early_ends_its_cells(sweep_file, tmp_path, number, code):
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]', **{"federation.rounds": 2000})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--engine", "inline"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("cells/*/rounds.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and (b"--resume" in errors or number == signal.SIGKILL)
    deadline = time.monotonic() + (30 if number == signal.SIGKILL else 0)
    with (out / ".lock").open("w") as lock:
        while True:  # no cell holds it any more; those of a killed sweep see so themselves
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def _sleep_through_interrupts(ready) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    ready.set()
    time.sleep(600)


def test_a_second_interrupt_kills_cells_that_do_not_end(tmp_path):
    runner = cells._Runner(tmp_path, 2, "inline", print, 0, Terminal(quiet=True), "", tmp_path)
    spawn = multiprocessing.get_context("spawn")
    for _ in range(2):
        ready = spawn.Event()
        process = spawn.Process(target=_sleep_through_interrupts, args=(ready,), daemon=True)
        process.start()
        assert ready.wait(60)
        runner._running.add(process)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `fedlora` sets it
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    again.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner._stop()
    finally:
        signal.signal(signal.SIGTERM, before)
    for process in runner._running:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL

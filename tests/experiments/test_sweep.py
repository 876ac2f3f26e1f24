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

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments import cells, results, sweep
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.data.partition import file_names
from fedlora.errors import InputError
from fedlora.runs import run_files
from fedlora.terminal import Terminal

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


@pytest.mark.parametrize(
    "always",
    [
        "",
        'privacy.trust = "secure-aggregation"\nprivacy.honest = 3\n'
        'federation.weighting = "public-size"',
    ],
)
def test_an_arm_without_dp_is_one_case_for_all_budgets(sweep_file, always):
    grid = "[grid]\nprivacy.epsilon = [1.0, 8.0, inf]"
    text = f'arms = ["base", "federated", "federated-dp"]\n[set]\n{always}\n{grid}'
    cases = sweep.read(sweep_file(text, **{"home.method": "interpolate"}))
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
        'median = { federation.robust = "median" }\n'
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


def test_results_of_an_earlier_grid_go_when_no_case_of_the_new_one_is_complete(tmp_path):
    out = save_sweep(tmp_path / "sweep", {"federated": [{"accuracy": 0.5}]})
    results.write(out)
    (out / "report.html").write_text("of the earlier grid")
    about = results.manifest(out)
    about["cases"][0]["cells"] = {"": "not-run"}
    (out / results.MANIFEST).write_text(json.dumps(about))
    results.write(out)
    assert {path.name for path in out.iterdir()} == {results.MANIFEST, "cells"}


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
    text = 'arms = ["base", "federated"]\n[set]\naccept = ["noise"]\n'
    text += 'tracking.mlflow = "sqlite:///t.db"\nengine.threads = 2\n[grid]\nseed = [1]'
    for case in sweep.read(sweep_file(text)):
        config = case.config
        assert config.accept == ("noise",) and config.engine.threads == 2
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
    runner = cells._Runner(tmp_path, 2, "inline", print, 0, Terminal(quiet=True), "")
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

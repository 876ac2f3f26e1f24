"""Sweeps: what a file expands to, what is refused before anything runs, what is reported."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments import cells, results, sweep
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.runs import run_files
from fedlora.terminal import Terminal

runner = CliRunner()
KEY = "5a" * 32
ALL_ARMS = 'arms = ["base", "central", "central-dp", "federated", "federated-dp"]'


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
    for name in needed:
        seen = records.load(made[name].config)
        digest = b"".join(sorted(row.tobytes() for row in seen.all_held_out.records)).hex()
        by_seed.setdefault(made[name].config.seed, set()).add(digest)
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[1] != by_seed[2]


def test_arms_train_on_the_same_rows_in_different_hands(sweep_file):
    made, needed = sweep.cells(sweep.read(sweep_file(f"{ALL_ARMS}\n[grid]\nseed = [1]")), KEY)

    def rows(name):
        return sorted(row.tobytes() for row in records.load(made[name].config).all_train.records)

    assert len({tuple(rows(name)) for name in needed}) == 1
    assert [made[name].institutions for name in needed] == [4, 1, 1, 4, 4]


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


def test_defaults_follow_from_the_keys_of_all(tmp_path):
    """What the base does not give may follow from the grid."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "defaults"\narms = ["central", "federated", "federated-dp"]\n'
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
    assert of("central", "stack") == of("central", "adam")


def test_other_records_are_another_cell(sweep_file, complaints, tmp_path):
    mine = tmp_path / "mine.csv"
    mine.write_text(complaints.read_text())
    path = sweep_file('arms = ["federated"]\n[grid]\nseed = [1]', **{"data.source": str(mine)})
    before, _ = sweep.cells(sweep.read(path), KEY)
    mine.write_text(complaints.read_text().replace("Alpha", "Omega"))  # the same rows elsewhere
    records.forget()  # as another process would
    after, _ = sweep.cells(sweep.read(path), KEY)
    assert len(before) == len(after) == 1 and set(before) != set(after)


def test_a_cells_name_follows_from_what_it_computes_alone(sweep_file):
    one, _ = sweep.cells(sweep.read(sweep_file('arms = ["federated"]\n[grid]\nseed = [1, 2]')), KEY)
    text = 'arms = ["federated"]\n[grid]\nseed = [2, 1]'
    other, _ = sweep.cells(sweep.read(sweep_file(text)), KEY)
    assert set(one) == set(other) and len(one) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('arms = ["federated"]\n[grid]\nadapter.rnk = [1]', ["adapter.rnk", "adapter.rank"]),
        ('arms = ["federated"]\nsets = 1\n[grid]\nseed = [1]', ["sets", "no key of a sweep"]),
        ('arms = ["federated"]\n[grid]', ["no grid"]),
        ('arms = ["federated"]\n[grid]\nseed = []', ["seed", "at least one value"]),
        ('arms = ["federated"]\n[grid]\nseed = 1', ["seed = 1", "list"]),
        ('arms = ["federated"]\n[grid]\nseed = [1, 1]', ["each once"]),
        ('arms = ["federated"]', ["no grid"]),
        ("arms = []\n[grid]\nseed = [1]", ["no arms"]),
        ('arms = ["federatd"]\n[grid]\nseed = [1]', ["federatd", "federated"]),
        ('arms = ["federated"]\n[grid]\nadapter.rank = [0]', ["adapter.rank is 0", "at least 1"]),
        ('arms = ["central"]\n[grid]\nprivacy.epsilon = ["a"]', ["privacy.epsilon is 'a'"]),
        ('arms = ["federated"]\n[grid]\nrun-dir = ["x"]', ["run-dir", "--out"]),
        (
            'arms = ["central", "base"]\n[set.central]\ndata.partition = "iid"\n[grid]\nseed = [1]',
            ["share one split", "data.partition"],
        ),
        (
            'arms = ["federated-dp"]\n[grid]\nprivacy.epsilon = [inf]',
            ["federated-dp", "privacy.epsilon is inf"],
        ),
        ('arms = ["central"]\n[grid]\ndata.text = ["body"]', ["body"]),
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


def save_sweep(out, cells):
    """Write a sweep of one setting: arm -> the result of each of its seeds."""
    cases = [
        {"arm": arm, "axes": {}, "seed": seed, "cell": f"{arm}-{seed}"}
        for arm, found in cells.items()
        for seed in range(len(found))
    ]
    out.mkdir(exist_ok=True)
    about = {"name": "x", "command": "fedlora sweep x.toml", "cases": cases}
    (out / results.MANIFEST).write_text(json.dumps(about))
    for case in cases:
        name = case["cell"]
        result = {"institutions": {}, "epsilon_max": "inf", "seconds": 1.0}
        result |= cells[case["arm"]][case["seed"]]
        save_cell(results.run_dir(out, name), result)
    return out


@pytest.mark.slow
def test_a_sweep_runs_its_arms_and_never_a_finished_cell_again(sweep_file, tmp_path):
    path, out = sweep_file(f"{ALL_ARMS}\n[grid]\nseed = [1]"), tmp_path / "out"
    command = ("sweep", path, "--out", out, "--jobs", 2, "--engine", "inline", "--json")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["cells"], said["done"], said["failed"]) == (5, 5, {})
    pooled = {x["arm"]: x for x in said["results"] if x["institution"] == results.ALL}
    assert list(pooled) == list(sweep.ARMS)
    assert pooled["federated-dp"]["seeds"] == 1 and 0 < pooled["federated-dp"]["epsilon"] <= 8
    assert pooled["base"]["bytes"] == 0 < pooled["federated"]["bytes"]
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(said["results"])
    assert (out / "report.html").exists()

    again = json.loads(invoke(*command).stdout)
    assert (again["before"], again["done"]) == (5, 0)

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
    said = invoke("sweep", path, "--out", out)
    assert said.exit_code == 1
    assert f"cell {cell} failed: its result.json cannot be read" in said.stderr


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
    assert cells._drop_begun(tmp_path, made) == ["old", "edited"]
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == ["new", "none"]


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
    result = invoke(*command[3:])
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
    result = invoke(*command[3:])
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

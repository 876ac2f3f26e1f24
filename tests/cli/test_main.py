"""The command line as a person meets it: outputs, exit codes, one line for each bad input."""

import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.rounds
from cli.main import app
from fedlora import FederationConfig, PrivacyConfig, RunConfig, TrainingConfig
from fedlora.config import gone
from fedlora.data import records
from fedlora.privacy.budget import plan_run

runner = CliRunner()
QUIETLY = ("--engine", "inline")


def invoke(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


def refused(*arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def config_file(tmp_path, tiny_config):
    def write(**values):
        path = tmp_path / "x.toml"
        path.write_text(tiny_config(**({"run-dir": "", "federation.rounds": 1} | values)).to_toml())
        return path

    return write


def test_config_lists_every_key_and_resolves_a_file(config_file):
    rows = json.loads(invoke("config", "--json").stdout)
    assert {"privacy.epsilon", "adapter.rank"} <= rows.keys() and rows["seed"]["type"]
    shown = invoke("config", config_file(**{"privacy.epsilon": float("inf")}), "--json").stdout
    read = json.loads(shown, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["privacy.epsilon"] == "inf"
    assert read["data.labels"] == []
    assert "rounds = 7" in invoke("config", config_file(), "--set", "federation.rounds=7").stdout


def test_run_then_evaluate_predict_and_merge(config_file, tmp_path, complaints, monkeypatch):
    out = tmp_path / "out"
    result = invoke("run", config_file(), "--out", out, "--engine", "inline", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {"accuracy", "macro_f1", "epsilon_max", "rounds", "seconds", "run_dir"} <= said.keys()
    assert said["run_dir"] == str(out)

    measured = json.loads(invoke("evaluate", out, "--data", complaints, "--json").stdout)
    assert (measured["n"], measured["truncated"]) == (480, 0)
    more = tmp_path / "more.csv"
    more.write_text(f"text,label\n{'stolen ' * 20},fraud\nmortgage lender,loan\n")
    measured = json.loads(invoke("evaluate", out, "--data", more, "--json").stdout)
    assert (measured["n"], measured["truncated"], measured["max_length"]) == (2, 1, 16)
    said = invoke("evaluate", out, "--data", more).stdout
    assert "1 text longer than 16 tokens" in said and "left out" not in said
    more.write_text(more.read_text() + "loans,\n,loan\n,card\n")
    measured = json.loads(invoke("evaluate", out, "--data", more, "--json").stdout)
    assert (measured["n"], measured["without_text"], measured["without_label"]) == (2, 2, 1)
    said = invoke("evaluate", out, "--data", more).stdout
    assert "2 rows without text" in said and "1 row without label" in said

    texts = ("stolen phishing scam", "mortgage " * 20)
    said = json.loads(invoke("predict", out, *texts, "--json").stdout)
    assert [a["text"] for a in said["answers"]] == list(texts)
    assert {a["answer"] for a in said["answers"]} <= {"loan", "card", "fraud"}
    assert (said["truncated"], said["max_length"]) == (1, 16)
    plain = invoke("predict", out, *texts)
    assert len(plain.stdout.splitlines()) == 2
    assert plain.stderr.strip() == "cut to length: 1 text longer than 16 tokens"

    table, answered = tmp_path / "in.csv", tmp_path / "out.csv"
    table.write_text("id,story\n7,stolen phishing\n8,mortgage lender\n")
    columns = ("--set", "data.text=story")
    done = invoke("predict", out, "--data", table, *columns, "--out", answered)
    assert not done.stderr
    assert done.stdout == f"2 answers in {answered}\n", done.output
    rows = list(csv.DictReader(answered.open(newline="")))
    assert [row["id"] for row in rows] == ["7", "8"] and 0 < float(rows[0]["score"]) <= 1
    refused("predict", out, "--data", table, words=["data.text is 'text'", "id, story"])
    refused("predict", out, words=["give texts or --data"])
    refused("predict", out, "stolen", "--data", table, words=["not both"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("predict", out, "stolen", "--set", "engine.gpus=1", words=["torch finds no GPU"])
    refused("predict", out, " ", words=["text 1 of 1 is empty"])
    refused("predict", out, "--data", table, *columns, "--out", answered, words=["exists"])
    more.write_text(more.read_text().replace("text,label", "story,kind"))
    columns += ("--set", "data.label=kind")
    measured = json.loads(invoke("evaluate", out, "--data", more, *columns, "--json").stdout)
    assert (measured["n"], measured["truncated"]) == (2, 1)
    refused("evaluate", out, "--data", more, "--set", "seed=2", words=["seed", "data.text"])
    shown = json.loads(invoke("ledger", "show", out / "ledgers", "--json").stdout)
    assert shown.keys() == {"Alpha", "Beta", "Gamma", "Delta"}
    assert all(one["runs"] == 1 and one["epsilon"] > 0 for one in shown.values())
    assert "Alpha" in invoke("ledger", "show", out / "ledgers").stdout
    refused("ledger", "show", tmp_path, words=["has no ledger"])

    assert invoke("merge", out, tmp_path / "merged").exit_code == 0
    assert list((tmp_path / "merged").glob("*.safetensors"))
    refused("merge", out, tmp_path / "merged", words=["exists"])
    refused("run", config_file(), "--out", out, words=["holds another run", "--resume"])
    refused("run", "--resume", out, words=["is complete", "adapter.start"])


@pytest.mark.parametrize("command", gone.COMMANDS)
def test_a_command_that_is_gone_says_what_to_use(command):
    refused(command, "anything", words=[command, gone.COMMANDS[command][:20]])


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e[red]x[/red]:warning:"
SHOWN = r"\x1b]0;owned\x07\x9b2J\u202e[red]x[/red]:warning:"


def test_labels_and_texts_cannot_write_to_the_terminal_but_as_text(
    config_file, tmp_path, complaints, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    rows = complaints.read_text().replace(",fraud,", f",{HOSTILE},").replace("Alpha", HOSTILE)
    source, out = tmp_path / "hostile.csv", tmp_path / "out"
    source.write_text("".join(row for row in rows.splitlines(True) if ",card," not in row))
    few = tmp_path / "few.csv"  # of these the hostile label is the most frequent
    few.write_text(f"text,label\nstolen,{HOSTILE}\nphishing,{HOSTILE}\nmortgage,loan\n")
    assign = ("--set", f"data.source={source}", "--set", f"data.test-source={few}")
    assign += ("--set", "data.partition=iid", "--set", "data.institutions=2")

    ran = invoke("run", config_file(), *assign, "--out", out, "--engine", "inline")
    assert f"({SHOWN})" in ran.stdout and ran.exit_code == 0, ran.output
    measured = invoke("evaluate", out, "--data", few)
    assert f"{SHOWN} " in measured.stdout and measured.exit_code == 0, measured.output
    said = invoke("predict", out, f"stolen {HOSTILE}", "two\nlines")
    assert f"stolen {SHOWN}\n" in said.stdout and said.exit_code == 0, said.output
    assert r"two\nlines" in said.stdout and len(said.stdout.splitlines()) == 2
    refused("evaluate", out, "--data", complaints, words=[SHOWN, "'card'"])
    for result in (ran, measured, said, invoke("evaluate", out, "--data", few, "--json")):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u26a0]", result.output)
    read = json.loads(invoke("evaluate", out, "--data", few, "--json").stdout)
    assert HOSTILE in read["per_class"]


@pytest.mark.parametrize(
    ("assign", "words"),
    [
        ("adapter.rnk=4", ["adapter.rnk", "adapter.rank"]),
        ("adapter.rank=0", ["adapter.rank", "0", "at least 1"]),
        ("adapter.rank=33", ["adapter.rank", "33", "query", "at most 32"]),
        ("privacy.epsilon=-2", ["privacy.epsilon", "-2", "above 0"]),
        ("seed=many", ["seed", "'many'", "whole number"]),
        ("model.name=nowhere/at-all", ["nowhere/at-all"]),
        ("model.name=package:no-such-package", ["no-such-package", "install"]),
        ("data.source=/no/such.csv", ["/no/such.csv"]),
        (f"data.source=/{'x' * 300}", ["data source", "File name too long", "who runs this"]),
        ("data.text=body", ["body", "text"]),
        ("data.labels=loan,card", ["fraud"]),
        ("data.min-records=100000", ["min-records", "100000"]),
        ("data.partition=iid", ["data.institutions"]),
        (
            "federation.institutions-per-round=9",
            ["federation.institutions-per-round", "9", "4 institutions"],
        ),
        ("privacy.delta=0.5", ["delta", "0.5"]),
        ("training.max-length=4096", ["training.max-length", "4096", "64"]),
        ("adapter.target-modules=nope", ["nope"]),
        ("privacy.epsilon=1e-9", ["epsilon", "1e-09", "raise"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(config_file, tmp_path, assign, words):
    out = tmp_path / "out"
    pairs = [part for one in assign.split() for part in ("--set", one)]
    refused("run", config_file(), *pairs, "--out", out, *QUIETLY, words=words)
    assert not out.exists()


def test_a_file_in_place_of_the_run_directory_is_refused(config_file, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused("run", config_file(), "--out", tmp_path / "out", *QUIETLY, words=["other files"])


def test_pickle_weights_are_refused(config_file, tmp_path, tiny_encoder):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_encoder / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    refused("run", config_file(), "--set", f"model.name={folder}", words=["pickles"])


def test_a_failure_midway_exits_1_keeps_the_checkpoint_and_says_how_to_resume(
    config_file, tmp_path, monkeypatch
):
    from strategies import fedavg

    out, calls = tmp_path / "out", []

    def second_fails(this_round, updates):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return fedavg.aggregate(this_round, updates)

    import strategies
    from strategies.base import Strategy

    failing = Strategy(aggregate=second_fails)
    monkeypatch.setitem(strategies.STRATEGIES, "fedavg", failing)
    result = invoke("run", config_file(**{"federation.rounds": 3}), "--out", out, *QUIETLY)
    assert result.exit_code == 1
    assert "No space left" in result.stderr and f"--resume {out}" in result.stderr
    assert (out / "checkpoints" / "round-000001.safetensors").exists()

    newest = out / "checkpoints" / "round-000001.safetensors"
    (out / "checkpoints" / "round-000002.safetensors").write_bytes(newest.read_bytes()[:100])
    changed = invoke("run", config_file(**{"federation.rounds": 4}), "--resume", out)
    assert changed.exit_code == 2 and "federation.rounds was 3, now 4" in changed.stderr
    resumed = invoke("run", "--resume", out, "--engine", "inline", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["rounds"] == 3


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_says_how_to_continue(config_file, tmp_path, monkeypatch, number):
    out, before = tmp_path / "runs" / "one", signal.getsignal(number)
    measure = server.rounds.Federation.measure

    def told_to_end(self, **values):
        if self.state.round == 2:
            os.kill(os.getpid(), number)
        return measure(self, **values)

    monkeypatch.setattr(server.rounds.Federation, "measure", told_to_end)
    result = invoke("run", config_file(**{"federation.rounds": 3}), "--out", out, *QUIETLY)
    assert result.exit_code == 1
    assert "error: interrupted" in result.stderr and f"--resume {out}" in result.stderr
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    latest = tmp_path / "runs" / "latest"
    assert latest.resolve() == out
    assert invoke("run", "--resume", latest, *QUIETLY).exit_code == 0
    assert json.loads((out / "result.json").read_text())["run_dir"] == str(out)
    assert invoke("predict", latest, "stolen").exit_code == 0


def test_plan_gives_noise_for_epsilon_and_epsilon_for_noise():
    size = ("--records", 3100, "--batch-size", 128, "--steps", 1211)
    common = (*size, "--delta", 1e-5, "--json")
    forward = json.loads(invoke("plan", *common, "--epsilon", 3).stdout)
    assert forward["sample_rate"] == 128 / 2048  # of the size class, as in a run
    assert forward["noise_multiplier"] == pytest.approx(3.37, rel=0.15)
    sigma = forward["noise_multiplier"]
    back = json.loads(invoke("plan", *common, "--noise-multiplier", sigma).stdout)
    assert back["epsilon"] == pytest.approx(forward["epsilon"]) and back["epsilon"] <= 3
    run = plan_run(
        RunConfig(
            training=TrainingConfig(batch_size=128.0, local_steps=1),
            federation=FederationConfig(rounds=1211),
            privacy=PrivacyConfig(epsilon=3.0),
        ),
        3100,
        1211,
    )
    default = json.loads(invoke("plan", *size, "--json", "--epsilon", 3).stdout)
    assert default["delta"] == run.delta
    assert default["noise_multiplier"] == run.noise_multiplier
    small = ("plan", "--records", 10, "--steps", 1)
    refused(*small, "--batch-size", 20, "--epsilon", 1, words=["--batch-size", "20", "10"])
    refused(*small, "--batch-size", 2, words=["--epsilon", "--noise-multiplier"])
    refused(*small, "--batch-size", 2, "--epsilon", 1, "--delta", 0.2, words=["delta", "0.2"])


def test_a_ledger_is_made_shown_and_verified(tmp_path):
    path = tmp_path / "bank.db"
    assert invoke("ledger", "init", path, "--max-epsilon", 10, "--delta", 1e-6).exit_code == 0
    shown = json.loads(invoke("ledger", "show", path, "--json").stdout)
    assert (shown["epsilon"], shown["limit"], shown["delta"]) == (0.0, 10.0, 1e-6)
    assert shown["entries"] == []
    lines = invoke("ledger", "show", path).stdout.splitlines()
    assert {"epsilon        0", "epsilon alone  0"} <= set(lines)
    assert invoke("ledger", "verify", path).exit_code == 0
    again = invoke("ledger", "init", path, "--max-epsilon", 99, "--delta", 1e-6)
    assert again.exit_code == 2 and "ledger" in again.stderr
    assert invoke("ledger", "show", tmp_path / "none.db").exit_code == 2
    nowhere = tmp_path / "none" / "bank.db"
    words = [f"make it: mkdir -m 700 {nowhere.parent}"]
    refused("ledger", "init", nowhere, "--max-epsilon", 10, "--delta", 1e-6, words=words)
    Path(path).write_bytes(b"no database")
    assert invoke("ledger", "verify", path).exit_code == 1
    assert invoke("ledger", "verify", tmp_path / "none.db").exit_code == 2


def test_a_run_on_ray_without_ray_is_refused_before_records_are_read(
    config_file, tmp_path, missing, monkeypatch
):
    monkeypatch.setattr(records, "load", lambda _: pytest.fail("records were read"))
    missing("ray")
    out = tmp_path / "out"
    words = ["--engine ray", "needs the Python package ray", "constraints.txt -e '.[simulation]'"]
    refused("run", config_file(), "--out", out, words=words)
    assert not out.exists()


@pytest.fixture
def heeded_signals():
    """As in a terminal: under nohup and in a script's background both are ignored."""
    heeded = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

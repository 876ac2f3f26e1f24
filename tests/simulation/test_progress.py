"""What a run says of itself on the terminal and in a log."""

import json
import math
import time

import pytest
from flwr.clientapp import ClientApp
from rich.table import Table

from fedlora.terminal import Terminal
from simulation import progress
from simulation.engines.inline import InlineGrid


def record(number, accuracy=None):
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    return {"round": number, "seconds": 1.0, "metrics": metrics, "epsilon_max": 1.0}


def described(records, tiny_config):
    return progress.describe(tiny_config(), records, 0, 4, 9.0, len(records))


def test_a_figure_that_was_measured_after_an_earlier_round_says_so(tiny_config) -> None:
    said = described([record(1, 0.25), record(2)], tiny_config)
    assert said.startswith("round 3/3 · accuracy 0.250 after round 1 ·")


def test_a_loss_that_is_not_finite_does_not_end_the_line(tiny_config) -> None:
    for loss in (None, "inf"):
        lines = [record(1), record(2), record(3) | {"metrics": {"token_loss": loss}}]
        assert described(lines, tiny_config) == "round 3/3 · epsilon 1"


def test_the_line_after_the_last_round_has_its_own_figure(tiny_config) -> None:
    said = described([record(1, 0.25), record(2), record(3, 0.75)], tiny_config)
    assert said.startswith("round 3/3 · accuracy 0.750 ·")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"epsilon_max": None}, ""),
        ({"epsilon_max": "inf"}, " · no DP (epsilon inf)"),
        ({"epsilon_max": 1.5}, " · epsilon 1.5"),
        ({"epsilon_max": "inf", "institution_epsilon": 2.0}, " · institution epsilon 2"),
    ],
)
def test_the_line_has_the_epsilon_that_is_known(tiny_config, known, said) -> None:
    lines = [record(1), record(2), record(3, 0.75) | known]
    assert described(lines, tiny_config) == f"round 3/3 · accuracy 0.750{said}"


@pytest.fixture
def log(tmp_path):
    """A console that writes into a file, and the lines in it."""
    stream = (tmp_path / "log").open("w")
    console = Terminal()
    console.file = stream

    def lines():
        stream.flush()
        return (tmp_path / "log").read_text().splitlines()

    yield console, lines
    stream.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_log_ends_with_the_figure_of_the_last_round_and_names_the_place_once(
    tiny_config, tmp_path, log
) -> None:
    console, lines = log
    config, run_dir = tiny_config(), tmp_path / "run"
    grid = InlineGrid(ClientApp(), 4, {})
    run_dir.mkdir()
    with progress.progress(config, grid, console):
        time.sleep(0.4)  # no configuration yet: the run is not accepted
        assert lines() == []
        (run_dir / "config.toml").write_text(config.to_toml())
        wait_for(lines)
        with (run_dir / "rounds.jsonl").open("a") as file:
            for number in (1, 2, 3):
                file.write(json.dumps(record(number, number / 4)) + "\n")
    assert lines()[0] == f"results in {run_dir}"
    assert lines()[-1].startswith("round 3/3 · accuracy 0.750")
    assert sum("results in" in line for line in lines()) == 1


def test_a_run_that_is_refused_names_no_place(tiny_config, log) -> None:
    console, lines = log
    grid = InlineGrid(ClientApp(), 4, {})
    with progress.progress(tiny_config(), grid, console):
        time.sleep(0.3)
    assert lines() == []


def test_the_table_says_which_rounds_changed_nothing_or_were_not_played(
    tiny_config, tmp_path, log
) -> None:
    console, lines = log
    config, run_dir = tiny_config(**{"privacy.epsilon": math.inf}), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "privacy.json").write_text('{"protects": "each record"}')
    result = {"institutions": {}, "seconds": 2.0, "epsilon_max": "inf", "delta": None}
    result |= {"trained_parameters": 8, "counts": {"truncated": 0}}
    for skipped, rounds in ((False, 3), (True, 2)):
        records = [record(n + 1) | {"skipped": skipped} for n in range(rounds)]
        text = "".join(json.dumps(one) + "\n" for one in records)
        (run_dir / "rounds.jsonl").write_text(text)
        progress.summary(config, result | {"rounds": rounds}, console)
        said = "".join(lines())
        assert ("2 of 2 rounds changed nothing" in said) == skipped
        assert ("ended after 2 of 3 rounds" in said) == skipped


def test_written_answers_have_no_most_frequent_class() -> None:
    counts = {
        "yes": {"truth": 3, "predicted": 4, "correct": 3},
        "no": {"truth": 1, "predicted": 0, "correct": 0},
    }
    for result, rows in (
        ({"per_class": counts}, 2),  # the baseline, and the only prediction
        ({"per_class": counts, "token_loss": 1.5}, 0),
    ):
        table = Table()
        progress.add_baseline(table, result)
        assert table.row_count == rows

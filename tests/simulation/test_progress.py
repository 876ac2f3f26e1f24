"""What a run says of itself on the terminal and in a log."""

import json
import time

import pytest
from flwr.clientapp import ClientApp

from fedlora.terminal import Terminal
from simulation import progress
from simulation.engines.inline import InlineGrid


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


def record(number, accuracy=None):
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    return {"round": number, "seconds": 1.0, "metrics": metrics, "epsilon_max": 1.0}

"""The bench's own logic: what fails it, what the table says, how a command is measured."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench, measure, work

ON = {
    "processor": "Some CPU @ 2.0GHz",
    "cores": 2,
    "memory_gib": 24,
    "python": "3.11.2",
    "versions": {"torch": "2.13.0"},
}


def _row(value, **more):
    made = bench.record(bench.Outcome(values=[value], **more), "0123456789abcdef")
    assert made["value"] == made["low"] == made["high"] == value
    return made


@pytest.mark.parametrize(
    ("name", "before", "now", "fails"),
    [
        ("flower", 4.0, 3.4, False),  # more is better
        ("flower", 4.0, 3.3, True),
        ("flower", 4.0, 8.0, False),
        ("dp-time", 1.0, 1.19, False),  # less is better
        ("dp-time", 1.0, 1.21, True),
        ("dp-time", 1.0, 0.5, False),
    ],
)
def test_over_a_fifth_worse_than_before_is_a_regression(name, before, now, fails):
    found = bench.complaints({name: _row(now)}, {name: _row(before)})
    assert bool(found) == fails
    if fails:
        assert name in found[0] and "over 20% worse" in found[0] and "at 012345678" in found[0]


def test_what_was_not_measured_before_or_now_is_no_regression():
    skipped = bench.record(bench.Outcome(skipped="no nginx"), "")
    assert not bench.complaints({"flower": _row(0.1)}, {})
    assert not bench.complaints({"flower": _row(0.1)}, {"flower": skipped})
    assert not bench.complaints({"flower": skipped}, {"flower": _row(4.0)})


def test_a_row_that_is_skipped_keeps_its_earlier_figure():
    skipped = bench.record(bench.Outcome(skipped="needs --smollm2 DIR"), "")
    before = {"smollm2": _row(0.4), "gone": _row(1.0)}
    assert bench.kept(before, {"smollm2": skipped, "worker": skipped, "flower": _row(5.0)}) == {
        "smollm2": _row(0.4),
        "worker": skipped,
        "flower": _row(5.0),
    }
    assert bench.kept(before, {"smollm2": _row(0.3)}) == {"smollm2": _row(0.3)}


def test_another_accuracy_fails_whatever_the_time():
    sides = {"fedlora": {"accuracy": [0.80, 0.82]}, "flower": {"accuracy": [0.83, 0.83]}}
    assert not bench._other_accuracy(sides, 0.03)
    problem = bench._other_accuracy(sides, 0.01)
    assert problem == "accuracies differ: fedlora 0.810, flower 0.830"
    assert bench.complaints({"flower": _row(9.0, problem=problem)}, {}) == [f"flower: {problem}"]


def test_the_table_has_every_row_and_says_what_is_missed_skipped_or_not_measured():
    rows = {
        "flower": _row(6.0),
        "pfl": _row(1.2),
        "worker": bench.record(bench.Outcome(skipped="needs --smollm2 DIR"), ""),
        "opacus": _row(0.2, problem="accuracies differ"),
    }
    rows["pfl"] |= {"values": [1.1, 1.2, 1.3], "low": 1.1, "high": 1.3}
    other = {"machine": {**ON, "processor": "Other CPU"}, "date": "2026-01-02", "rows": {}}
    other["rows"]["start"] = _row(3.0)
    text = bench.table([{"machine": ON, "date": "2026-01-01", "rows": rows}, other])
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert {row.what for row in bench.ROWS.values()} <= set(lines)
    line = {name: lines[row.what] for name, row in bench.ROWS.items()}
    assert "at least 5.5 x | 6.00 x (once) | not measured |" in line["flower"]
    assert "1.20 x (1.10 x to 1.30 x), **missed** | not" in line["pfl"]
    assert "needs --smollm2 DIR" in line["worker"]
    assert "accuracies differ" in line["opacus"] and "missed" not in line["opacus"]
    assert "at most 4 s | not measured | 3.00 s (once) |" in line["start"]
    assert text.startswith("| what | target | Some CPU @ 2.0GHz | Other CPU |")
    assert "Some CPU @ 2.0GHz, 2 cores" in text and "torch 2.13.0" in text


def test_every_row_is_measured_once():
    measured = [name for names in bench.MEASUREMENTS.values() for name in names]
    assert sorted(measured) == sorted(bench.ROWS)
    assert bench.BEGIN in bench.DOCUMENT.read_text() and bench.END in bench.DOCUMENT.read_text()


def test_sides_run_in_turn():
    order = []

    def side(name):
        def run(turn):
            order.append((name, turn))
            return SimpleNamespace(seconds=1.0, peak_mib=1.0)

        return run

    found = bench.in_turn({"a": side("a"), "b": side("b")}, 2)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {name: len(runs) for name, runs in found.items()} == {"a": 2, "b": 2}


def test_results_of_one_processor_are_one_file():
    assert bench.result_file(ON).name == "some-cpu-2-0ghz-2-cores.json"
    assert bench.committed(bench.RESULTS / "no-such-processor.json") == {"rows": {}}


CHILD = "import time; held = bytearray(64 << 20); held[::4096] = b'x' * len(held[::4096]); "
CHILD += "time.sleep(1.5)"


def test_memory_is_that_of_the_whole_tree_and_the_last_json_counts(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLING_SECONDS", 0.3)
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}]); "
    script += 'print("{no json"); print(\'{"x": 1}\'); print("done")'
    done = measure.run([sys.executable, "-c", script])
    assert done.said == {"x": 1}
    assert done.seconds > 1.5 and 64 < done.peak_mib < 200


def test_a_command_that_fails_says_why():
    with pytest.raises(measure.Failed, match=r"exited with 3\n[\s\S]*no such thing"):
        measure.run([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"])


def test_the_work_is_the_same_but_for_what_dp_needs():
    plain, private = work.Work().config().flat(), work.Work(private=True).config().flat()
    changed = {key for key in plain if plain[key] != private[key]}
    assert changed == {"privacy.epsilon", "training.sample-rate", "federation.weighting"}
    assert 0.15 < private["training.sample-rate"] < 0.25  # 64 rows of 231 to 391


def test_rivals_get_the_rows_of_every_institution(tmp_path):
    file = work.Work(institutions=3, private=True).write(tmp_path)
    said = json.loads(file.read_text())
    assert len(said["shards"]) == len(said["noise"]) == 3
    for path in [*said["shards"].values(), said["held_out"]]:
        with Path(path).open(newline="") as table:
            rows = list(csv.DictReader(table))
        assert len(rows) > 64 and {row["label"] for row in rows} <= set(said["classes"])

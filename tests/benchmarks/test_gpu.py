"""The GPU's benchmark runs as a whole on tiny models, and says when there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "no GPU: torch sees none"), (("--device", "cpu"), "--device cpu takes --small")],
)
def test_it_ends_with_one_clear_line_where_it_cannot_measure(arguments, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit, match=said):
        gpu.main()


def test_every_figure_is_measured_on_tiny_models():
    done = _run("--device", "cpu", "--small")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert not [line for line in lines if "left out" in line]
    for model in ("encoder", "causal"):
        found = {line["what"]: line for line in lines if line["model"] == model}
        for kind in gpu.PASSES:
            assert found[f"exactness, {kind}"]["error"] < 0.05  # a base in bf16
            assert found[f"exactness, {kind}"]["alone"] == "yes"
        assert {"plain step", "plain PEFT, float32", "Opacus' hooks, float32"} <= set(found)
        assert found["32 institutions together"]["per"] == "institution"
    assert "| exactness, padded |" in done.stdout


def test_what_does_not_begin_in_time_is_left_out(monkeypatch, capsys):
    arguments = type("Arguments", (), {"device": "cpu", "small": True, "minutes": -1})
    measured = gpu.Measured(arguments)
    measured.add("model", "DP step", lambda: pytest.fail("it was measured"))
    assert gpu.tables(measured.lines) == "|  | model |\n| --- | --- |\n| DP step | no time |\n"

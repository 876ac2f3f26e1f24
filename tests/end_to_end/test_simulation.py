"""Whole runs on a tiny encoder: what a user gets, from both engines."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from client.ledger import Ledger
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState, kind
from fedlora.privacy import composition
from fedlora.privacy.budget import plan_run
from fedlora.runs.run_files import read_records
from server.privacy_statement import NO_PROMISE_WITH_SEED, largest_epsilon, statement
from server.run_directory import RunState
from server.spending import Spending
from simulation import run
from tests.samples import final_adapter, privacy_spent, same_adapters
from tests.simulation.workers import worker_pids


def test_a_run_without_dp_learns_and_leaves_a_complete_directory(tiny_config, simulate_run):
    config = tiny_config(
        **{
            "privacy.epsilon": float("inf"),
            "federation.rounds": 12,
            "training.local-steps": 5,
            "training.learning-rate": 0.02,
            "training.optimizer": "adam",
            "federation.server-optimizer": "none",
            "federation.server-learning-rate": 1.0,
        }
    )
    result = simulate_run(config)
    assert result["accuracy"] > 0.9  # majority is about 0.35
    run = Path(config.run_dir)
    records = read_records(run)
    assert [r["round"] for r in records] == list(range(1, 13))
    assert records[-1]["metrics"]["accuracy"] == result["accuracy"]
    assert records[0]["reported"].keys() == {"Alpha", "Beta", "Delta", "Gamma"}
    assert all(i["sent"] > 0 and i["received"] > 0 for i in records[0]["institutions"].values())
    assert "protects nobody" in json.loads((run / "privacy.json").read_text())["protects"]
    assert {
        "config.toml",
        "environment.json",
        "rounds.jsonl",
        "checkpoints",
        "adapter",
        "privacy.json",
        "result.json",
    } <= {p.name for p in run.iterdir()}


def test_the_adapter_opens_with_peft_and_gives_the_same_outputs(tiny_config, simulate_run):
    from peft import PeftModel

    config = tiny_config()
    simulate_run(config)
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    final_adapter(config).load_into(work.model)
    shard, _ = federation.pooled_held_out()
    batch = work.task.collate(shard, range(8))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    base = models.load_base(
        config.model.name, dtype="fp32", quantization="none", task="classification", num_labels=3
    )
    opened = PeftModel.from_pretrained(
        base.model, Path(config.run_dir) / "adapter", trust_remote_code=False
    ).eval()
    work.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            opened(**inputs).logits, work.model(**inputs).logits, rtol=1e-5, atol=1e-5
        )


def test_inline_and_ray_give_identical_adapters(
    tiny_config, simulate_run, simulate_on_ray, tmp_path
):
    def made(name, simulate):
        config = tiny_config(**{"run-dir": str(tmp_path / name), "adapter.dropout": 0.1})
        simulate(config)
        return final_adapter(config)

    assert same_adapters(made("inline", simulate_run), made("ray", simulate_on_ray))


def test_secure_noise_is_never_the_same_twice(tiny_config, simulate_run, tmp_path):
    made = []
    for name in ("a", "b"):
        config = tiny_config(
            **{"run-dir": str(tmp_path / name), "privacy.noise": "secure", "federation.rounds": 1}
        )
        simulate_run(config)
        made.append(final_adapter(config))
    assert not same_adapters(*made)


def test_privacy_json_and_ledgers_agree_to_the_last_digit(tiny_config, simulate_run):
    config = tiny_config(**{"privacy.noise": "secure"})
    result = simulate_run(config)
    run = Path(config.run_dir)
    statement = json.loads((run / "privacy.json").read_text())
    assert len(statement["institutions"]) == 4
    for name, said in statement["institutions"].items():
        with Ledger.open(run / "ledgers" / f"{name}.db") as ledger:
            shown = ledger.show()
        assert said["epsilon"] == shown["epsilon"] == said["ledger_epsilon"]
        assert said["delta"] == shown["delta"]
        assert 0 < said["epsilon"] <= shown["limit"] == 8.0
        assert said["steps"] == 3 == sum(e["steps"] for e in shown["entries"])
    assert result["epsilon_max"] == max(i["epsilon"] for i in statement["institutions"].values())
    assert result["epsilon_max"] > 7.5  # the plan uses the budget it was given


def test_a_seeded_run_says_that_it_protects_nobody(tiny_config, simulate_run):
    config = tiny_config(**{"federation.rounds": 1})
    simulate_run(config)
    assert (
        "protects nobody"
        in json.loads((Path(config.run_dir) / "privacy.json").read_text())["protects"]
    )


def test_an_institution_without_budget_drops_out_and_the_federation_goes_on(
    tiny_config, simulate_run, tmp_path
):
    config = tiny_config(**{"run-dir": str(tmp_path / "run")})
    ledgers = tmp_path / "run" / "ledgers"
    ledgers.mkdir(parents=True)
    Ledger.create(ledgers / "Beta.db", max_epsilon=7.0, delta=1e-4, accountant="rdp")
    simulate_run(config)
    failed = [r["aggregation"]["rejected"].get("Beta") for r in read_records(tmp_path / "run")]
    assert failed[0] is None and failed[-1] == "budget-exhausted"
    assert read_records(tmp_path / "run")[-1]["updates"] == 3
    with Ledger.open(ledgers / "Beta.db") as ledger:
        assert 5 < ledger.spent() <= 7.0


def test_two_processes_do_not_play_one_run(tiny_config, simulate_run):
    config = tiny_config(**{"federation.rounds": 1})
    simulate_run(config)
    with run.load("inline", config), run.open_engine("inline", config) as grid:
        with pytest.raises(InputError, match="another process began a run in"):
            run.run_rounds(config, grid, resumed=False)
        with pytest.raises(InputError, match="completed the run in"):
            run.run_rounds(config, grid, resumed=True)
    assert len(read_records(Path(config.run_dir))) == 1


def test_an_institution_that_takes_no_part_is_named_with_its_code_and_reason(
    tiny_config, simulate_run, tmp_path, caplog
):
    config = tiny_config()
    ledgers = Path(config.run_dir) / "ledgers"
    ledgers.mkdir(parents=True)
    (ledgers / "Beta.db").write_bytes(b"no database")
    result = simulate_run(config)
    (finding,) = (one for one in result["findings"] if one["name"] == "took-no-part")
    assert "1 institutions took no part" in finding["text"] and not finding["voids"]
    assert "Beta (ledger-corrupt)" in finding["text"]
    assert "Beta: ledger-corrupt" in caplog.text
    assert "Beta.db" in (Path(config.run_dir) / "institutions.log").read_text()


def test_units_of_a_column_are_protected_together(tiny_config, simulate_run):
    config = tiny_config(
        **{"privacy.unit": "customer", "training.physical-batch": 2, "federation.rounds": 2}
    )
    result = simulate_run(config)
    said = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    assert said["protects"] == NO_PROMISE_WITH_SEED
    federation = records.load(config)
    for i, name in enumerate(federation.names):  # 160 customers in all, each at one bank or several
        units = len(np.unique(federation.train(i).units))
        assert units < len(federation.train(i))  # rows are joined
        assert said["institutions"][name]["steps"] == 2
    assert {i["unit"] for i in said["institutions"].values()} == {"customer"}
    assert result["epsilon_max"] <= 8.0


CHILD = """
import sys
from cli.main import app
app(sys.argv[1:])
"""


def _start(*arguments):
    command = [sys.executable, "-c", CHILD, "run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for_round(run: Path, number: int, process, seconds=120):
    deadline = time.monotonic() + seconds
    while len(read_records(run)) < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["seeded", "off"])
def test_a_run_killed_at_any_moment_resumes_to_the_same_adapter(
    tiny_config, simulate_run, tmp_path, noise
):
    values = {"federation.rounds": 8, "privacy.epsilon": float("inf") if noise == "off" else 8.0}
    undisturbed = tiny_config(**values, **{"run-dir": str(tmp_path / "calm")})
    simulate_run(undisturbed)
    file, run = tmp_path / "x.toml", tmp_path / "killed"
    file.write_text(tiny_config(**values, **{"run-dir": ""}).to_toml())
    process = _start(file, "--out", run, "--engine", "ray")
    for number in (2, 5):
        _wait_for_round(run, number, process)
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process = _start("--resume", run)
    assert process.wait() == 0, process.communicate()[1]
    resumed = AdapterState.open(run / "adapter")
    assert same_adapters(resumed, final_adapter(undisturbed))
    assert [r["round"] for r in read_records(run)] == list(range(1, 9))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_institution_tried_again(
    tiny_config, simulate_run, tmp_path
):
    import threading

    from simulation import run

    calm = tiny_config(**{"federation.rounds": 6, "run-dir": str(tmp_path / "calm")})
    simulate_run(calm)
    config = calm.replace({"run-dir": str(tmp_path / "run")})
    with (
        run.load("ray", config),
        run.open_engine("ray", config) as grid,
    ):
        victims = worker_pids(grid)

        def kill():
            while len(read_records(tmp_path / "run")) < 2:
                time.sleep(0.01)
            os.kill(victims[0], signal.SIGKILL)

        threading.Thread(target=kill).start()
        run.run_rounds(config, grid)
        assert victims[0] not in worker_pids(grid)
    assert all(r["updates"] == 4 for r in read_records(tmp_path / "run"))
    assert same_adapters(final_adapter(config), final_adapter(calm))


def test_svd_runs_under_dp_and_moves_every_part(tiny_config, simulate_run):
    config = tiny_config(**{"federation.strategy": "svd", "adapter.method": "rslora"})
    simulate_run(config)
    start = trainable.load(config, records.load(config).labels).start
    end = final_adapter(config)
    moved = {kind(name) for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"A", "B", "head"}


def test_a_run_ends_when_everybody_left_has_had_its_planned_rounds(
    tiny_config, simulate_run, tmp_path
):
    """One of four refuses; each round asks one, and nobody may be asked for more than its share."""
    config = tiny_config(
        **{
            "federation.rounds": 8,
            "federation.institutions-per-round": 1,
        }
    )
    ledgers = Path(config.run_dir) / "ledgers"
    ledgers.mkdir(parents=True)
    (ledgers / "Beta.db").write_bytes(b"no database")
    result = simulate_run(config)
    assert result["rounds"] == 6  # three of them, two rounds each
    assert (Path(config.run_dir) / "adapter" / "adapter_model.safetensors").exists()


def test_a_resume_on_other_records_is_refused(tiny_config, simulate_run, complaints, tmp_path):
    copy = tmp_path / "copy.csv"
    copy.write_text(complaints.read_text())
    config = tiny_config(**{"data.source": str(copy), "privacy.epsilon": float("inf")})
    simulate_run(config)
    (Path(config.run_dir) / "result.json").unlink()
    copy.write_text("".join(complaints.read_text().splitlines(keepends=True)[:-5]))
    records.forget()  # as in a new process
    with pytest.raises(InputError, match="other records, base weights or"):
        simulate_run(config)


def test_rounds_asked_count_although_no_answer_arrived(tiny_config):
    config = tiny_config()
    plan = plan_run(config, 120, 3)
    spent = privacy_spent(noise_multiplier=plan.noise_multiplier * 1.001)
    state = RunState(
        run="r",
        inputs="",
        round=3,
        adapter=AdapterState({}),
        moments={},
        asked={"Alpha": 3, "Beta": 2},
        average={},
        averaged=0,
        privacy={"Alpha": dataclasses.asdict(spent)},
        seconds=0.0,
    )
    spending = Spending(config=config, participations=3)
    said = statement(config, ["Alpha", "Beta"], state, {}, spending, follows=False)
    alpha = said["institutions"]["Alpha"]
    assert (alpha["steps"], alpha["unreported_steps"]) == (3, 1)
    # The server's own figures; the institution's are quoted as its word.
    assert alpha["noise_multiplier"] == plan.noise_multiplier
    assert alpha["epsilon"] == composition.epsilon(plan.events, 1e-4, "prv")
    assert alpha["institution_says"] == dataclasses.asdict(spent)
    bound = {"rounds_asked": 2, "epsilon_at_most": 8.0, "delta": 1e-4}
    assert said["without_report"] == {"Beta": bound}
    assert largest_epsilon(said) == 8.0


@pytest.mark.parametrize("strategy", ["ffa", "rolora"])
def test_a_strategy_that_freezes_a_factor_trains_and_sends_the_rest_only(
    tiny_config, simulate_run, strategy
):
    config = tiny_config(**{"federation.strategy": strategy, "federation.rounds": 4})
    result = simulate_run(config)
    start = trainable.load(config, records.load(config).labels).start
    end = final_adapter(config)
    moved = {kind(name) for name in start if not torch.equal(start[name], end[name])}
    assert moved == ({"B", "head"} if strategy == "ffa" else {"A", "B", "head"})
    trained = sum(tensor.numel() for tensor in end.only(tuple(moved)).values())
    assert result["trained_parameters"] == trained
    assert result["base"]["dtype"] in ("float32", "bfloat16")
    rounds = read_records(Path(config.run_dir))
    assert all(i["received"] < 0.7 * i["sent"] for r in rounds for i in r["institutions"].values())

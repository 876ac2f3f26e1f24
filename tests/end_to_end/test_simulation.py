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

import fedlora
from client.ledger import Ledger
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState, kind
from fedlora.privacy import composition
from fedlora.privacy.budget import plan_run
from fedlora.runs.run_files import read_records
from server.privacy_statement import NO_PROMISE_WITH_SEED, largest_epsilon, statement
from server.roster import RunFailed
from server.run_directory import RunDirectory, RunState
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


def test_inline_and_ray_with_one_and_three_workers_give_identical_adapters(
    tiny_config, simulate_run, simulate_on_ray, tmp_path
):
    def made(name, workers, simulate, **options):
        values = {"run-dir": str(tmp_path / name), "engine.workers": workers}
        config = tiny_config(**values, **{"adapter.dropout": 0.1})
        simulate(config, **options)
        return final_adapter(config)

    inline = made("inline", 1, simulate_run)
    assert same_adapters(inline, made("one", 1, simulate_on_ray))
    assert same_adapters(inline, made("three", 3, simulate_on_ray))


def test_as_many_institutions_as_wished_train_at_home(tiny_config, simulate_run):
    config = tiny_config(**{"home.method": "interpolate", "home.steps": 2, "home.institutions": 2})
    joining = simulate_run(config)["joining"]
    first, second = (records.load(config).names[i] for i in (0, 2))
    assert sorted(joining["institutions"]) == sorted([first, second])
    own = {path.parent.name for path in Path(config.run_dir).glob("institutions/*/own")}
    assert own == {first, second}


def test_inline_and_ray_give_the_same_figures_of_joining(
    tiny_config, simulate_run, simulate_on_ray, tmp_path
):
    """Workers train institutions in other groups, which rounds differently and predicts alike."""

    def made(name, workers, simulate):
        values = {"run-dir": str(tmp_path / name), "engine.workers": workers}
        home = {"home.method": "interpolate", "home.steps": 8}
        config = tiny_config(**values, **home, **{"federation.rounds": 1})
        joining, rows = simulate(config)["joining"], len(records.load(config).all_held_out)
        assert len(joining["institutions"]) == 4 and "not_compared" not in joining
        assert sum(one["rows"] for one in joining["institutions"].values()) == rows
        return {name: figure for name, figure in joining.items() if name != "seconds"}

    assert made("inline", 1, simulate_run) == made("three", 3, simulate_on_ray)


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


def test_a_second_run_on_the_same_ledgers_is_refused_before_it_spends(
    tiny_config, simulate_run, tmp_path
):
    shared = {"privacy.ledger": str(tmp_path / "ledgers"), "privacy.max-epsilon": 10.0}
    simulate_run(tiny_config(**shared, **{"run-dir": str(tmp_path / "first")}))
    path = tmp_path / "ledgers" / "Alpha.db"
    with Ledger.open(path) as ledger:
        before = ledger.show()
    with pytest.raises(InputError, match="budget exhausted: 4 of 4"):
        simulate_run(tiny_config(**shared, **{"run-dir": str(tmp_path / "second")}))
    assert not (tmp_path / "second").exists() or not any((tmp_path / "second").iterdir())
    with Ledger.open(path) as ledger:
        assert ledger.show() == before


def test_an_institution_without_budget_drops_out_and_the_federation_goes_on(
    tiny_config, simulate_run, tmp_path
):
    shared = {"privacy.ledger": str(tmp_path / "ledgers"), "run-dir": str(tmp_path / "run")}
    config = tiny_config(**shared)
    (tmp_path / "ledgers").mkdir()
    Ledger.create(tmp_path / "ledgers" / "Beta.db", max_epsilon=7.0, delta=1e-4, accountant="rdp")
    simulate_run(config)
    failed = [r["aggregation"]["rejected"].get("Beta") for r in read_records(tmp_path / "run")]
    assert failed[0] is None and failed[-1] == "budget-exhausted"
    assert read_records(tmp_path / "run")[-1]["updates"] == 3
    with Ledger.open(tmp_path / "ledgers" / "Beta.db") as ledger:
        assert 5 < ledger.spent() <= 7.0


@pytest.mark.parametrize("refusing", [False, True])
def test_a_run_that_failed_in_its_last_round_is_not_completed_by_a_resume(
    tiny_config, simulate_run, tmp_path, refusing
):
    diverges = {"training.learning-rate": 1e4, "privacy.epsilon": 1.0}
    ledgers = {"privacy.ledger": str(tmp_path / "ledgers")}
    config = tiny_config(**diverges, **ledgers, **{"federation.rounds": 1})
    if refusing:  # so that not all were asked
        (tmp_path / "ledgers").mkdir()
        (tmp_path / "ledgers" / "Beta.db").write_bytes(b"no database")
    for _ in range(2):
        with pytest.raises(RunFailed, match="round 1: no institution sent a valid update"):
            simulate_run(config)
    assert not (Path(config.run_dir) / "result.json").exists()


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
    config = tiny_config(**{"privacy.ledger": str(tmp_path / "ledgers")})
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "ledgers" / "Beta.db").write_bytes(b"no database")
    result = simulate_run(config)
    (finding,) = (one for one in result["findings"] if one["name"] == "took-no-part")
    assert "1 institutions took no part" in finding["text"] and not finding["voids"]
    assert "Beta (ledger-corrupt)" in finding["text"]
    assert "Beta: ledger-corrupt" in caplog.text
    assert "Beta.db" in (Path(config.run_dir) / "institutions.log").read_text()


def test_size_classes_cost_nothing(tiny_config, simulate_run):
    config = tiny_config(**{"federation.weighting": "public-size", "federation.rounds": 2})
    simulate_run(config)
    statement = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    for name, said in statement["institutions"].items():
        with Ledger.open(Path(config.run_dir) / "ledgers" / f"{name}.db") as ledger:
            entries = ledger.show()["entries"]
        assert said["epsilon"] <= 8.0
        assert len(entries) == 2


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


def test_the_physical_batch_changes_no_result(tiny_config, simulate_run, tmp_path):
    made = []
    for size in (3, 64):
        config = tiny_config(
            **{"run-dir": str(tmp_path / str(size)), "training.physical-batch": size}
        )
        simulate_run(config)
        made.append(final_adapter(config))
    for name in made[0]:
        torch.testing.assert_close(made[0][name], made[1][name], rtol=1e-3, atol=1e-4)


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
    process = _start(file, "--out", run, "--engine", "ray", "--quiet")
    for number in (2, 5):
        _wait_for_round(run, number, process)
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process = _start("--resume", run, "--quiet")
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
    config = calm.replace({"run-dir": str(tmp_path / "run"), "engine.workers": 2})
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
            "privacy.ledger": str(tmp_path / "ledgers"),
        }
    )
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "ledgers" / "Beta.db").write_bytes(b"no database")
    result = simulate_run(config)
    assert result["rounds"] == 6  # three of them, two rounds each
    assert (Path(config.run_dir) / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("mine", [False, True])
def test_a_run_that_never_began_leaves_no_ledgers_and_removes_none(
    tiny_config, simulate_run, monkeypatch, mine
):
    ledgers = Path(tiny_config().run_dir) / "ledgers"
    if mine:
        ledgers.mkdir(parents=True, mode=0o700)
        Ledger.create(ledgers / "Beta.db", max_epsilon=9.0, delta=1e-4, accountant="rdp")

    def interrupted(*_):
        assert (ledgers / "Alpha.db").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "create", interrupted)
        simulate_run(tiny_config(**{"privacy.epsilon": 3.0}))
    if mine:
        with Ledger.open(ledgers / "Beta.db") as ledger:
            assert ledger.max_epsilon == 9.0
        return
    assert not ledgers.exists()
    simulate_run(tiny_config())
    with Ledger.open(ledgers / "Alpha.db") as ledger:
        assert ledger.max_epsilon == 8.0


def test_what_a_kill_leaves_of_a_write_into_the_adapter_is_not_bound(tiny_config, simulate_run):
    config = tiny_config(**{"federation.rounds": 1})
    simulate_run(config)
    run = Path(config.run_dir)
    (run / "result.json").unlink()
    (run / "adapter" / ".adapter_model.safetensors.k1ll3d").touch()
    simulate_run(config)
    bound = json.loads((run / "privacy.json").read_text())["run"]["files"]
    assert "adapter/adapter_model.safetensors" in bound and "k1ll3d" not in str(bound)


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


def test_a_resume_where_auto_is_another_dtype_says_so(
    tiny_config, simulate_run, monkeypatch, caplog
):
    config = tiny_config(**{"model.dtype": "auto", "privacy.epsilon": float("inf")})
    monkeypatch.setattr(models, "fast_bf16", lambda _: False)
    simulate_run(config)
    (Path(config.run_dir) / "result.json").unlink()
    monkeypatch.setattr(models, "fast_bf16", lambda _: True)
    trainable.forget()  # as in a new process
    simulate_run(config)
    trainable.forget()
    assert (
        "begun with the base model in float32, and here model.dtype auto is bfloat16" in caplog.text
    )


def test_a_run_may_be_resumed_on_a_smaller_machine_and_not_as_another_run(tiny_config):
    config = tiny_config(**{"engine.threads": 2})
    directory = RunDirectory(Path(config.run_dir))
    directory.create(config)
    assert directory.check(config.replace({"engine.threads": 1, "engine.workers": 1}))
    with pytest.raises(InputError, match=r"holds a run with another .*\(adapter\.rank was 8, now"):
        directory.check(config.replace({"engine.threads": 1, "adapter.rank": 3}))


def test_a_run_is_not_continued_by_another_version(tiny_config, monkeypatch):
    config = tiny_config()
    directory = RunDirectory(Path(config.run_dir))
    directory.create(config)
    assert directory.check(config)
    file = directory.path / "environment.json"
    began = json.loads(file.read_text())
    file.write_text(json.dumps(began | {"git_sha": "f" * 40, "git_dirty": False}))
    if began["git_sha"]:
        with pytest.raises(InputError, match=r"at commit f{12}, and this is .*restore that one"):
            directory.check(config)
    file.write_text(json.dumps(began | {"git_sha": None}))
    assert directory.check(config)
    file.write_text(json.dumps(began | {"code": "f" * 64}))
    with pytest.raises(InputError, match=r"at code f{12}, and this is .*restore that one"):
        directory.check(config)
    file.write_text(json.dumps({name: began[name] for name in began.keys() - {"code"}}))
    assert directory.check(config)  # of an earlier version
    monkeypatch.setattr(fedlora, "__version__", "0.0.1")
    configuration = (directory.path / "config.toml").read_text()
    for text in (configuration, f"a-key-of-another-version = 1\n{configuration}"):
        (directory.path / "config.toml").write_text(text)
        with pytest.raises(InputError, match=r"begun with fedlora \d\S*, and this is 0\.0\.1: "):
            directory.check(config)
    (directory.path / "config.toml").write_text(configuration)
    (directory.path / "environment.json").write_text("{}")
    unreadable = r"environment\.json cannot be read .*; restore the file"
    with pytest.raises(InputError, match=unreadable):
        directory.check(config)
    (directory.path / "environment.json").unlink()
    assert directory.check(config)  # the process ended while it made the directory
    (directory.path / "checkpoints").mkdir()
    (directory.path / "checkpoints" / "round-000001.safetensors").touch()
    with pytest.raises(InputError, match=unreadable):
        directory.check(config)


def test_a_deployed_run_goes_on_after_its_code_was_mended(tmp_path):
    values = {"data.source": "institutions", "data.institutions": 3, "data.labels": '["a", "b"]'}
    config = from_flat({**values, "run-dir": str(tmp_path / "run")})
    directory = RunDirectory(tmp_path / "run")
    directory.create(config)
    file = directory.path / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": "f" * 64}))
    assert directory.check(config)


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

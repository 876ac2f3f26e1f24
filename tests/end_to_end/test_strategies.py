"""Whole runs under strategies that carry residuals, keep a part or mix ranks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from client import training
from client.institution import Institution
from client.private_round import train_rounds
from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState, kind, residual_names
from fedlora.runs import finished_run
from fedlora.runs.run_files import read_records
from fedlora.wire import wire
from server.run_directory import RunDirectory
from tests.samples import train_order

PLAIN = {"federation.server-optimizer": "none", "federation.server-learning-rate": 1.0}
LEARNING = {
    **PLAIN,
    "privacy.epsilon": float("inf"),
    "training.local-steps": 5,
    "training.learning-rate": 0.02,
    "training.optimizer": "adam",
    "federation.rounds": 12,
}


def _run_dir(config) -> Path:
    return Path(config.run_dir)


def _logits(model, config):
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    shard, _ = federation.pooled_held_out()
    batch = work.task.collate(shard, range(len(shard)))
    with torch.no_grad():
        return model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def _opened(config, adapter):
    """The base with an adapter, by PEFT alone."""
    base = models.load_base(
        config.model.name,
        dtype="fp32",
        quantization=config.model.quantization,
        task="classification",
        num_labels=3,
    )
    return PeftModel.from_pretrained(base.model, adapter, trust_remote_code=False)


def _accuracy(logits, config):
    shard, _ = records.load(config).pooled_held_out()
    return float((logits.argmax(1) == torch.tensor(shard.targets)).double().mean())


@pytest.mark.parametrize("strategy", [name for name in STRATEGY_TABLE if name != "fedavg"])
def test_every_strategy_learns_without_dp(tiny_config, simulate_run, strategy):
    result = simulate_run(tiny_config(**LEARNING | {"federation.strategy": strategy}))
    assert result["accuracy"] > 0.9  # majority is about 0.35


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora-rslora"])
@pytest.mark.parametrize("strategy", ["stack", "exact"])
def test_what_is_carried_by_the_base_is_saved_as_one_plain_adapter(
    tiny_config, simulate_run, tmp_path, strategy, method, quantization
):
    config = tiny_config(
        **PLAIN,
        **{
            "federation.strategy": strategy,
            "adapter.method": method,
            "model.quantization": quantization,
            "adapter.rank": 3,
            "privacy.epsilon": 100.0,
        },
    )
    result = simulate_run(config)
    state = RunDirectory(_run_dir(config)).latest()
    work = trainable.load(config, records.load(config).labels)
    state.adapter.load_into(work.model)
    ours = _logits(work.model, config)
    theirs = _logits(_opened(config, _run_dir(config) / "adapter"), config)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert _accuracy(theirs, config) == pytest.approx(result["accuracy"], abs=0.011)
    # evaluate and merge open the same thing
    run_dir = _run_dir(config)
    opened = finished_run.open_model(run_dir, finished_run.configuration(run_dir, {}), "")
    torch.testing.assert_close(_logits(opened.model, config), ours, rtol=1e-4, atol=1e-4)
    if quantization == "none":
        finished_run.merge(_run_dir(config), tmp_path / "merged")
        merged = models.load_base(
            str(tmp_path / "merged"),
            dtype="fp32",
            quantization="none",
            task="classification",
            num_labels=3,
        ).model
        torch.testing.assert_close(_logits(merged, config), ours, rtol=1e-4, atol=1e-4)
        labels = json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]
        assert list(labels.values()) == ["card", "fraud", "loan"]


@pytest.mark.parametrize("epsilon", [8.0, float("inf")])
def test_what_stays_with_an_institution_is_never_sent_and_survives_a_resume(
    tiny_config, simulate_run, tmp_path, epsilon
):
    made = []
    for name in ("calm", "resumed"):
        config = tiny_config(
            **{
                "run-dir": str(tmp_path / name),
                "federation.strategy": "fedsa",
                "adapter.method": "dora",
                "federation.rounds": 4,
                "privacy.epsilon": epsilon,
            }
        )
        result = simulate_run(config)
        run = _run_dir(config)
        if name == "resumed":  # as if the server had died two rounds ago
            newest = sorted((run / "checkpoints").iterdir())[-1]
            newest.unlink()
            (run / "result.json").unlink()
            result = simulate_run(config)
        made.append(run)
    start = trainable.load(config, records.load(config).labels).start
    end = AdapterState.open(run / "adapter")
    moved = {kind(name) for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"A", "head"}
    own = [AdapterState.open(run / "institutions" / n / "adapter") for n in ("Alpha", "Beta")]
    apart = {kind(n) for n in start if not torch.equal(own[0][n], own[1][n])}
    assert apart == {"B", "magnitude"}
    for name in ("Alpha", "Beta", "Gamma", "Delta"):
        calm, again = (AdapterState.open(run / "institutions" / name / "adapter") for run in made)
        assert all(torch.equal(calm[n], again[n]) for n in calm)
    sent = sum(len(a.data) for a in wire.pack_adapter(start.only(("A", "head"))).values())
    assert {i["received"] for i in read_records(run)[0]["institutions"].values()} == {sent}
    card = (run / "institutions" / "Alpha" / "adapter" / "README.md").read_text()
    assert "must not leave the institution" in card and "PeftModel" in card
    # the pooled accuracy is that of each one's own adapter on its own rows
    federation = records.load(config)
    right = 0
    for index, name in enumerate(federation.names):
        model = _opened(config, run / "institutions" / name / "adapter")
        shard = federation.held_out(index)
        batch = trainable.load(config, federation.labels).task.collate(shard, range(len(shard)))
        with torch.no_grad():
            logits = model.eval()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ).logits
        right += int((logits.argmax(1) == torch.tensor(shard.targets)).sum())
    assert result["accuracy"] == pytest.approx(right / result["n"], abs=0.011)
    assert set(result["institutions"]) == set(federation.names)


def test_a_part_that_is_not_finite_is_not_kept(tiny_config, simulate_run, monkeypatch):
    """Without DP training may diverge: the institution goes on from its last round."""
    train = training.train

    def diverges(work, shard, plan, size, source):
        loss = train(work, shard, plan, size, source)
        if not seen:
            next(iter(work.parameters().values())).data.fill_(torch.nan)
        seen.append(1)
        return loss

    seen = []
    monkeypatch.setattr(training, "train", diverges)
    config = tiny_config(
        **{"federation.strategy": "fedsa", "privacy.epsilon": float("inf"), "federation.rounds": 2}
    )
    simulate_run(config)
    rejected = [r["aggregation"]["rejected"] for r in read_records(_run_dir(config))]
    assert rejected == [{"Alpha": "invalid-update"}, {}]


def test_an_order_cannot_make_an_institution_send_what_it_keeps(tiny_config):
    config = tiny_config(**{"federation.strategy": "fedsa"})
    work = trainable.load(config, records.load(config).labels)
    order = train_order(work, parts=("A", "head"), kept=("B",))
    who = Institution.locate(config, 0)
    who.accept(dataclasses.replace(order, kept=("B", "magnitude")))
    for changes in ({}, {"kept": ()}, {"kept": ("B", "magnitude"), "parts": ("A", "B", "head")}):
        with pytest.raises(Refusal, match="strategy-mismatch"):
            who.accept(dataclasses.replace(order, **changes))


def test_a_residual_larger_than_agreed_is_refused(tiny_config):
    config = tiny_config(**PLAIN, **{"federation.strategy": "stack"})
    work = trainable.load(config, records.load(config).labels)
    path = next(name for name in work.start if kind(name) == "A").removesuffix(".lora_A.weight")
    names = residual_names(path)
    order = train_order(
        work,
        adapter=work.start.updated({names[0]: torch.ones(65, 32), names[1]: torch.ones(32, 65)}),
    )
    with pytest.raises(Refusal, match="rank 65, above 64"):
        Institution.locate(config, 0).accept(order)


def test_the_same_order_from_another_start_is_another_release(tiny_config, tmp_path):
    """A server that makes the kept part change between two tries of one round pays twice."""
    config = tiny_config(**{"federation.strategy": "fedsa", "privacy.noise": "secure"})
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    who = Institution.locate(config, 0)
    who.open_ledger(create=True).close()

    def order(round):
        return train_order(work, round=round, parts=("A", "head"), kept=("B", "magnitude"))

    first = who.plan_round(who.accept(order(2)))
    first.charge()
    who.answer(order(1))  # leaves a kept part
    second = who.plan_round(who.accept(order(2)))
    second.charge()
    twin = who.plan_round(who.accept(order(2)))  # another process with the same order
    twin.charge()
    with first, second, twin:
        assert twin.key == second.key
        assert first.key != second.key
        assert sum(event.steps for event in first.ledger.history("a1")) == 3
        (trained,) = train_rounds([second])
        sent = who.store_local_parts(second.order, second.store_answer(trained))
        kept = sorted(who.directory.glob("kept-*-000002.safetensors"))[0].read_bytes()
        (late,) = train_rounds([first])
        with pytest.raises(Refusal, match="round-already-answered"):
            first.store_answer(late)
        (slower,) = train_rounds([twin])
        slower = slower.updated({n: t + 1e-7 for n, t in slower.items()})  # as another cohort may
        stored = who.store_local_parts(twin.order, twin.store_answer(slower))
        assert all(torch.equal(stored.adapter[n], sent.adapter[n]) for n in sent.adapter)
    assert sorted(who.directory.glob("kept-*-000002.safetensors"))[0].read_bytes() == kept
    assert {kind(name) for name in sent.adapter} == {"A", "head"}
    again = who.answer(order(2))
    assert all(torch.equal(again.adapter[n], sent.adapter[n]) for n in sent.adapter)


def test_a_damaged_kept_part_is_not_replaced_by_another(tiny_config, simulate_run, tmp_path):
    config = tiny_config(
        **{"federation.strategy": "fedsa", "federation.rounds": 3, "privacy.epsilon": float("inf")}
    )
    simulate_run(config)
    run = _run_dir(config)
    for file in sorted((run / "checkpoints").iterdir())[-1:]:
        file.unlink()
    (run / "result.json").unlink()
    for file in (run / "institutions" / "Beta").glob("kept-*-000002.safetensors"):
        file.write_bytes(b"damaged")
    simulate_run(config)
    rejected = read_records(run)[-1]["aggregation"]["rejected"]
    assert rejected == {"Beta": "kept-part-unreadable"}

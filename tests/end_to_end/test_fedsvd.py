"""Whole rounds under fedsvd, whose frozen A is another one in every round."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from client import private_training
from client.institution import Institution
from client.private_round import train_rounds
from fedlora.data import records
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState, kind
from fedlora.runs.run_files import read_records
from fedlora.wire import wire
from tests.samples import final_adapter

FEDSVD = {
    "federation.strategy": "fedsvd",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
}


def _orthonormal(state):
    """Whether each A has orthonormal rows, to 1e-6."""
    return [
        bool(((layer.a @ layer.a.T) - torch.eye(len(layer.a))).abs().max() < 1e-6)
        for layer in state.layers().values()
    ]


def _order(work, config, **changes):
    return wire.TrainOrder(
        **{
            "run": "a1",
            "round": 2,
            "participations": 3,
            "base": work.base.digest,
            "report": (),
            "parts": config.federation.traits.parts_sent(2),
            "kept": (),
            "adapter": work.start,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("method", "quantization", "epsilon"),
    [
        ("lora", "none", 8.0),
        ("dora", "none", 8.0),
        ("rslora", "nf4", 8.0),
        ("dora-rslora", "nf4", math.inf),
    ],
)
def test_a_run_in_which_half_the_institutions_are_asked_is_the_same_after_a_resume(
    tiny_config, simulate_run, tmp_path, method, quantization, epsilon
):
    ends = []
    for name in ("calm", "resumed"):
        config = tiny_config(
            **FEDSVD,
            **{
                "run-dir": str(tmp_path / name),
                "adapter.method": method,
                "model.quantization": quantization,
                "privacy.epsilon": epsilon,
                "training.local-steps": 2,
                "federation.rounds": 4,
                "federation.institutions-per-round": 2,
            },
        )
        result = simulate_run(config)
        if name == "resumed":  # as if the server had died in the last round
            run = Path(config.run_dir)
            max((run / "checkpoints").iterdir()).unlink()
            (run / "result.json").unlink()
            result = simulate_run(config)
        ends.append(final_adapter(config))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(_orthonormal(ends[0]))
    rounds = read_records(Path(config.run_dir))
    assert [r["asked"] for r in rounds] == [2] * 4
    start = trainable.load(config, records.load(config).labels).start
    answer = wire.pack_adapter(start.only(config.federation.traits.parts_sent(1)))
    size = sum(len(array.data) for array in answer.values())
    assert {i["received"] for r in rounds for i in r["institutions"].values()} == {size}
    # PEFT alone opens the released adapter and answers alike.
    base = models.load_base(
        config.model.name,
        dtype="fp32",
        quantization=quantization,
        task="classification",
        num_labels=3,
    )
    model = PeftModel.from_pretrained(
        base.model, Path(config.run_dir) / "adapter", trust_remote_code=False
    )
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    shard, _ = federation.pooled_held_out()
    batch = work.task.collate(shard, range(len(shard)))
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    right = (logits.argmax(1) == torch.tensor(shard.targets)).double().mean()
    assert result["accuracy"] == pytest.approx(float(right), abs=0.011)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_under_dp_only_b_magnitude_and_head_are_clipped_and_noised(
    tiny_config, monkeypatch, method
):
    clipped = []
    clip = private_training.clip

    def watched(gradients, bound):
        clipped.append(gradients.shape[1])
        return clip(gradients, bound)

    monkeypatch.setattr(private_training, "clip", watched)
    config = tiny_config(**FEDSVD, **{"adapter.method": method})
    work = trainable.load(config, records.load(config).labels)
    who = Institution.locate(config, 0)
    who.open_ledger(create=True).close()
    order = _order(work, config)
    with who.plan_round(who.accept(order)) as planned:
        planned.charge()
        (trained,) = train_rounds([planned])
        sent = who.store_local_parts(order, planned.store_answer(trained)).adapter
    before = work.start.only(order.parts)
    assert {kind(name) for name in trained if torch.equal(trained[name], work.start[name])} == {"A"}
    assert all(not torch.equal(trained[name], before[name]) for name in before)
    assert set(sent) == set(before)
    assert set(clipped) - {0} == {sum(tensor.numel() for tensor in before.values())}


def test_an_institution_trains_with_the_a_of_its_order_whatever_it_trained_with_before(
    tiny_config,
):
    """Under SGD the product after a round is the same for the factors B A and (B Q^T) (Q A).

    Q is orthogonal. With the A of the first order the second product is another one.
    """
    config = tiny_config(
        **FEDSVD,
        **{
            "privacy.epsilon": math.inf,
            "training.local-steps": 3,
            "training.learning-rate": 2.0,
        },
    )
    work = trainable.load(config, records.load(config).labels)
    who = Institution.locate(config, 0)
    draw = torch.Generator().manual_seed(3)
    plain, turned = dict(work.start), dict(work.start)
    for path, layer in work.start.layers().items():
        b = 0.1 * torch.randn(layer.b.shape, generator=draw)
        q = torch.linalg.qr(torch.randn(len(layer.a), len(layer.a), generator=draw))[0]
        plain |= layer._replace(b=b).named(path)
        turned |= layer._replace(a=q @ layer.a, b=b @ q.T).named(path)
    products = []
    for state in (plain, turned):
        order = _order(work, config, adapter=AdapterState(state))
        after = order.adapter.updated(who.answer(order).adapter)
        products.append({path: f.b @ f.a for path, f in after.layers().items()})
        began = {path: f.b @ f.a for path, f in order.adapter.layers().items()}
    for path, product in products[0].items():
        moved = float((product - began[path]).norm())
        assert moved > 0
        assert float((products[1][path] - product).norm()) < 1e-3 * moved

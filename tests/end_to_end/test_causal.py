"""A real causal language model (SmolLM2-135M) on real sentences, through Ray, with every method."""

import csv
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedlora.config.config import from_flat
from fedlora.config.sections import METHODS
from fedlora.data import records
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.runs.run_files import read_records
from tests.conftest import shared_data

LABELS = ("negative", "neutral", "positive")
PROMPTS = {
    "classification": "{text}\nOne of: {labels}?",
    "sft": "{text}\nNegative, neutral or positive?",
}
COMBINATIONS = [
    *itertools.product(METHODS, ("none", "nf4")),
    *itertools.product(("lora", "rslora"), ("int8",)),  # on a CPU PEFT cannot run DoRA on int8
]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """Five short sentences of each class of the Financial PhraseBank."""
    with shared_data("fpb/fpb.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if 40 <= len(row["text"]) <= 60]
    path = tmp_path_factory.mktemp("fpb") / "fpb.csv"
    with path.open("w", newline="") as file:
        small = csv.DictWriter(file, list(rows[0]))
        small.writeheader()
        for label in LABELS:
            small.writerows([row for row in rows if row["label"] == label][:5])
    return path


@pytest.fixture
def config(tmp_path, sentences):
    """Makes a run of two rounds: noise as for epsilon 1000, so that they do teach something."""
    directory = os.environ.get("FEDLORA_SMOLLM2", "")
    if not Path(directory, "config.json").exists():
        pytest.skip("set FEDLORA_SMOLLM2 to a directory with SmolLM2-135M-Instruct")

    def make(task, method, quantization):
        return from_flat(
            {
                "run-dir": str(tmp_path / "run"),
                "model.name": directory,
                "model.task": task,
                "model.quantization": quantization,
                "adapter.method": method,
                "adapter.rank": 4,
                "data.source": str(sentences),
                "data.partition": "iid",
                "data.institutions": 2,
                "data.min-records": 1,
                "data.prompt": PROMPTS[task],
                "training.batch-size": 0.5,
                "training.physical-batch": 2,
                "training.learning-rate": 0.2,
                "training.max-length": 96,
                "federation.rounds": 2,
                "privacy.epsilon": 1000.0,
                "privacy.delta": 1e-4,
                "privacy.noise": "seeded",
            }
        )

    yield make
    trainable.forget()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "sft"])
@pytest.mark.parametrize(("method", "quantization"), COMBINATIONS)
def test_smollm2_learns_under_dp_through_ray_and_its_adapter_opens_with_peft(
    config, simulate_run, task, method, quantization
):
    config = config(task, method, quantization)
    result = simulate_run(config, engine="ray")
    run = Path(config.run_dir)
    assert [r["updates"] for r in read_records(run)] == [2, 2]
    said = json.loads((run / "privacy.json").read_text())["institutions"]
    assert [i["steps"] for i in said.values()] == [2, 2]
    assert all(900 < i["epsilon"] <= 1000 for i in said.values())
    federation = records.load(config)
    assert result["n"] == len(federation.all_held_out) > 0
    if task == "sft":
        assert result["generated"] == result["n"]

    work, shard = trainable.load(config, federation.labels), federation.train(0)
    loss = "token_loss" if task == "sft" else "loss"
    work.start.load_into(work.model)
    before = work.task.evaluate(work.model, shard, work.labels)[loss]
    AdapterState.open(run / "adapter").load_into(work.model)
    after = work.task.evaluate(work.model, shard, work.labels)[loss]
    print(f"\n{task} {method} {quantization}: {result['seconds']} s, {before:.2f} to {after:.2f}")
    assert after < 0.95 * before

    batch = work.task.collate(shard, range(2))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        ours = work.model(**inputs).logits
        opened = PeftModel.from_pretrained(
            work.model.unload(), run / "adapter", trust_remote_code=False
        ).eval()
        theirs = opened(**inputs).logits
    error = float((theirs.float() - ours.float()).norm() / ours.float().norm())
    bf16 = next(work.base.model.parameters()).dtype == torch.bfloat16
    print(f"distance of the logits to PEFT's: {error:.1e}, {'bf16' if bf16 else 'fp32'}")
    assert error < (5e-2 if bf16 else 1e-5)  # PEFT takes the norms of DoRA in bf16, we in fp32

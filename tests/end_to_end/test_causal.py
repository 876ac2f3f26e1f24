"""A real causal language model (SmolLM2-135M) on real sentences, through Ray, with every method."""

import csv
import json
import os
from pathlib import Path

import pytest

from fedlora import config as configuration
from fedlora import trainable
from server.run_directory import read_records
from tests.conftest import shared_data

METHODS = [
    ("lora", "none"),
    ("rslora", "none"),
    ("dora", "none"),
    ("dora-rslora", "none"),
    ("lora", "nf4"),
    ("dora", "nf4"),
    ("lora", "int8"),
]
QUESTION = "What is the sentiment of this financial news: {labels}?\n\n{text}"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """The first 240 rows of the Financial PhraseBank."""
    path = tmp_path_factory.mktemp("fpb") / "fpb.csv"
    with shared_data("fpb/fpb.csv").open(newline="") as source, path.open("w", newline="") as small:
        rows = csv.reader(source)
        csv.writer(small).writerows(row for _, row in zip(range(241), rows, strict=False))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "sft"])
@pytest.mark.parametrize(("method", "quantization"), METHODS, ids="-".join)
def test_smollm2_trains_under_dp_through_ray(
    tmp_path, simulate_run, sentences, task, method, quantization
):
    directory = os.environ.get("FEDLORA_SMOLLM2", "")
    if not Path(directory, "config.json").exists():
        pytest.skip("set FEDLORA_SMOLLM2 to a directory with SmolLM2-135M-Instruct")
    sft = task == "sft"
    config = configuration.from_flat(
        {
            "run-dir": str(tmp_path / "run"),
            "model.name": directory,
            "model.task": task,
            "model.quantization": quantization,
            "adapter.method": method,
            "data.source": str(sentences),
            "data.partition": "iid",
            "data.institutions": 2,
            "data.prompt": QUESTION.replace("{labels}", "positive, negative or neutral")
            if sft
            else QUESTION,
            "training.sample-rate": 0.1,
            "training.physical-batch": 4,
            "training.max-length": 160,
            "federation.rounds": 2,
            "federation.evaluate-every": 0,
            "federation.server-optimizer": "adam",
            "federation.server-learning-rate": 0.001,
            "privacy.delta": 1e-4,
            "privacy.noise": "seeded",
        }
    )
    result = simulate_run(config, engine="ray")
    run = Path(config.run_dir)
    assert [r["updates"] for r in read_records(run)] == [2, 2]
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert 0 < result["epsilon_max"] <= 8.0
    assert len(json.loads((run / "privacy.json").read_text())["institutions"]) == 2
    if sft:
        assert 0 < result["token_loss"] < 12 and 0 <= result["unparseable"] <= result["generated"]
    else:
        assert 0 < result["accuracy"] <= 1 and set(result["per_class"]) == {
            "negative",
            "neutral",
            "positive",
        }
    print(
        f"\n{task} {method} {quantization}: {result['seconds']} s, "
        f"accuracy {result.get('accuracy')}, token loss {result.get('token_loss')}"
    )
    trainable.forget()

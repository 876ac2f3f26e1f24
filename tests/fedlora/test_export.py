"""An exported adapter opens with PEFT alone, says nothing of this machine, or is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora import export
from fedlora.errors import InputError
from tests.fedlora.test_finished_run import finished, tiny_causal  # noqa: F401


@pytest.fixture(scope="module")
def causal_run(tiny_causal, complaints, tmp_path_factory):  # noqa: F811
    return finished(
        tmp_path_factory.mktemp("causal") / "run",
        **{
            "model.name": str(tiny_causal),
            "model.task": "sft",
            "data.source": str(complaints),
            "data.max-records": 16,
            "data.test-fraction": 0.02,
            "training.sample-rate": 0.0,
            "training.batch-size": 4,
            "training.max-length": 128,
            "training.learning-rate": 0.5,
            "federation.rounds": 1,
        },
    )


def test_a_causal_adapter_is_exported_whole_and_names_no_directory(
    causal_run,
    tiny_causal,  # noqa: F811
    tmp_path,
):
    out = tmp_path / "served"
    said = export.vllm(causal_run, out)
    assert said == (
        f"vllm serve {tiny_causal.name} --enable-lora --lora-modules served={out} --max-lora-rank 8"
    )
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == tiny_causal.name
    assert saved["modules_to_save"] is None and not saved["use_dora"]
    assert str(tiny_causal) not in "".join(f.read_text() for f in out.glob("*.json"))
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    ids = tokenizer("stolen card", return_tensors="pt").input_ids
    logits = []
    for folder in (causal_run / "adapter", out):
        base = AutoModelForCausalLM.from_pretrained(tiny_causal, trust_remote_code=False)
        plain = base(ids).logits
        logits.append(PeftModel.from_pretrained(base, folder, trust_remote_code=False)(ids).logits)
    assert torch.equal(*logits) and not torch.equal(logits[0], plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["served"]
    with pytest.raises(InputError, match="served exists"):
        export.vllm(causal_run, out)


@pytest.mark.parametrize(
    ("change", "words"), [({"use_dora": True}, "of DoRA"), ({"r": 513}, "of rank 513")]
)
def test_an_adapter_that_vllm_does_not_read_is_refused(causal_run, tmp_path, change, words):
    shutil.copytree(causal_run, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=words):
        export.vllm(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused_by_name(tiny_config, simulate_run, tmp_path):
    made = tiny_config(**{"federation.rounds": 1})
    simulate_run(made)
    with pytest.raises(InputError, match="an encoder; vLLM serves adapters of causal models only"):
        export.vllm(tmp_path / "run", tmp_path / "out")

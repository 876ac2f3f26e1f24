"""An exported adapter opens with PEFT alone, says nothing of this machine, or is refused."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.errors import InputError
from fedlora.models import export
from tests.fedlora.runs.test_finished_run import finished, tiny_causal  # noqa: F401


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


@pytest.fixture
def changed_run(causal_run, tmp_path):
    """Makes a copy of the run with other values in adapter_config.json."""

    def make(**change):
        shutil.copytree(causal_run, tmp_path / "run")
        file = tmp_path / "run" / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return tmp_path / "run"

    return make


@pytest.mark.parametrize(
    ("change", "words"), [({"use_dora": True}, "of DoRA"), ({"r": 513}, "of rank 513")]
)
def test_an_adapter_that_vllm_does_not_read_is_refused(changed_run, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        export.vllm(changed_run(**change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


STAND_IN = """
import json, os, sys
from pathlib import Path
*options, adapter = sys.argv[1:]
given = dict(zip(options[::2], options[1::2], strict=True))
config = json.loads(Path(adapter, "adapter_config.json").read_text())
files = sorted(os.listdir(adapter))
offline = [os.environ[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
Path(given["--outfile"]).write_text(json.dumps([given, config, files, offline]))
"""
"""Takes llama.cpp's arguments and writes down what it was given."""


@pytest.fixture
def llama_cpp(tmp_path):
    """Makes a checkout whose converter is the given script."""

    def make(script=STAND_IN):
        checkout = tmp_path / "llama.cpp"
        (checkout / "gguf-py" / "gguf").mkdir(parents=True)
        (checkout / export.LORA_CONVERTER).write_text(script)
        return checkout

    return make


def test_the_converter_gets_adapter_card_and_base_and_is_offline(
    causal_run,
    tiny_causal,  # noqa: F811
    llama_cpp,
    tmp_path,
):
    checkout, out = llama_cpp(), tmp_path / "my adapter.gguf"
    serve, python, base = export.gguf(causal_run, out, checkout)
    given, saved, files, offline = json.loads(out.read_text())
    assert (given.pop("--base"), given.pop("--outtype")) == (str(tiny_causal), "f32")
    assert Path(given.pop("--outfile")).parent.parent == tmp_path and not given
    assert saved == json.loads((causal_run / "adapter" / "adapter_config.json").read_text())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert offline == ["1", "1"]
    name = f"{tiny_causal.name}.gguf"
    assert serve == f"llama-server -m {name} --lora '{out}'"
    assert python == f"Llama(model_path='{name}', lora_path='{out}')"
    assert base == f"python {checkout}/convert_hf_to_gguf.py {tiny_causal} --outfile {name}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.cpp", out.name]
    with pytest.raises(InputError, match="gguf exists"):
        export.gguf(causal_run, out, checkout)


def test_the_converter_which_knows_alpha_over_rank_only_gets_the_scale_of_rslora(
    changed_run, llama_cpp, tmp_path
):
    run = changed_run(use_rslora=True, r=4, lora_alpha=16)
    export.gguf(run, tmp_path / "out.gguf", llama_cpp())
    saved = json.loads((tmp_path / "out.gguf").read_text())[1]
    assert not saved["use_rslora"] and saved["lora_alpha"] / saved["r"] == 16 / math.sqrt(4)


@pytest.mark.parametrize(
    ("change", "words"), [({"use_dora": True}, "of DoRA"), ({"fan_in_fan_out": True}, "GPT-2")]
)
def test_an_adapter_that_gguf_has_no_form_for_is_refused(
    changed_run, llama_cpp, tmp_path, change, words
):
    with pytest.raises(InputError, match=words):
        export.gguf(changed_run(**change), tmp_path / "out.gguf", llama_cpp("raise SystemExit"))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("import sys; print('a b'); sys.exit('1\\n2\\nno such architecture')", 1),
        ("print('1\\n2\\nno such architecture')", 0),
    ],
)
def test_a_converter_that_fails_is_quoted_and_leaves_nothing(
    causal_run, llama_cpp, tmp_path, script, code
):
    words = rf"ended with exit code {code} .* its last lines: 1 \| 2 \| no such architecture$"
    with pytest.raises(InputError, match=words):
        export.gguf(causal_run, tmp_path / "out.gguf", llama_cpp(script))
    assert [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_converter_that_cannot_run_is_refused(causal_run, llama_cpp, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    with pytest.raises(InputError, match="--llama-cpp is not given; give a checkout"):
        export.gguf(causal_run, out, None)
    with pytest.raises(InputError, match=r"without convert_lora_to_gguf.py; give a checkout"):
        export.gguf(causal_run, out, tmp_path)
    checkout = llama_cpp()
    shutil.rmtree(checkout / "gguf-py")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package gguf is not installed; .* pip install gguf"):
        export.gguf(causal_run, out, checkout)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [("none", ""), ("nf4", "that was measured"), ("int8", "but for activations in 8 bits")],
)
def test_of_a_run_on_a_quantised_base_one_note_says_how_to_serve_what_was_measured(
    changed_run, llama_cpp, tmp_path, caplog, quantization, words
):
    run = changed_run()
    file = run / "config.toml"
    text = file.read_text()
    assert 'quantization = "none"' in text
    file.write_text(text.replace('quantization = "none"', f'quantization = "{quantization}"'))
    export.vllm(run, tmp_path / "served")
    export.gguf(run, tmp_path / "out.gguf", llama_cpp())
    notes = [
        record.getMessage() for record in caplog.records if record.name == "fedlora.models.export"
    ]
    assert len(notes) == 2 * (quantization != "none")
    for note, program in zip(notes, ("vLLM", "llama.cpp"), strict=False):
        assert f"quantised to {quantization}, and {program} opens the base as it is" in note
        assert f"`fedlora merge {run} DIRECTORY`" in note and note.endswith(words)


def test_an_encoder_is_refused_by_name(tiny_config, simulate_run, llama_cpp, tmp_path):
    made = tiny_config(**{"federation.rounds": 1})
    simulate_run(made)
    with pytest.raises(InputError, match="an encoder; vLLM serves adapters of causal models only"):
        export.vllm(tmp_path / "run", tmp_path / "out")
    with pytest.raises(InputError, match=r"an encoder; llama.cpp takes adapters of causal models"):
        export.gguf(tmp_path / "run", tmp_path / "out", llama_cpp())


@pytest.mark.slow
def test_the_real_converter_writes_the_factors_of_the_adapter(causal_run, tmp_path, monkeypatch):
    checkout = Path(os.environ.get("FEDLORA_LLAMA_CPP", ""))
    if not (checkout / export.LORA_CONVERTER).is_file():
        pytest.skip("set FEDLORA_LLAMA_CPP to a checkout of llama.cpp")
    export.gguf(causal_run, tmp_path / "out.gguf", checkout)
    monkeypatch.syspath_prepend(checkout / "gguf-py")
    made = pytest.importorskip("gguf").GGUFReader(tmp_path / "out.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in made.tensors}
    saved = json.loads((causal_run / "adapter" / "adapter_config.json").read_text())
    assert made.fields["adapter.lora.alpha"].contents() == saved["lora_alpha"]
    file = causal_run / "adapter" / "adapter_model.safetensors"
    for name, ours in safetensors.torch.load_file(file).items():
        *_, layer, factor, _ = name.split(".")
        theirs = tensors.pop(f"blk.0.attn_{layer[0]}.weight.{factor.lower()}")
        if (layer, factor) == ("q_proj", "lora_B"):  # rows of queries have another order there
            assert not torch.equal(theirs, ours)
            ours, theirs = (t.sort(dim=0).values for t in (ours, theirs))
        assert torch.equal(theirs, ours), name
    assert not tensors
    assert str(tmp_path).encode() not in (tmp_path / "out.gguf").read_bytes()

"""The files of a finished run open in a process without fedlora and give the run's answers."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cli.main import app as cli
from fedlora.config import config
from fedlora.errors import InputError
from fedlora.models import model_files, trainable
from fedlora.models.adapters import WEIGHTS_FILE, AdapterState
from fedlora.rounding import at_most
from fedlora.runs import finished_run, model_card
from fedlora.runs.run_files import read_run_file
from server.start import start_adapter
from simulation import run
from simulation.result import Result
from tests.fedlora.small_models import byte_tokenizer

READER = """
import json, re, sys
from pathlib import Path
assert not any(name.partition(".")[0] == "fedlora" for name in sys.modules)
asked = json.loads(sys.stdin.read())
said = {}
for name, (directory, base) in asked["directories"].items():
    card = Path(directory, "README.md").read_text()
    (code,) = re.findall("```python\\n(.*?)\\n```", card, re.DOTALL)
    code = code.replace('= "."', f"= {directory!r}").replace('TEXTS = ["..."]', "")
    code = re.sub('BASE = .*', f"BASE = {base!r}", code)
    space = {"TEXTS": asked["texts"]}
    exec(code, space)
    said[name] = [a["label"] if isinstance(a, dict) else a for a in space["answers"]]
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline
from peft import AutoPeftModelForSequenceClassification
merged, adapter = (asked["directories"].get(name, [""])[0] for name in ("merged", "adapter"))
refused = {
    "config": lambda: AutoConfig.from_pretrained(merged),
    "model": lambda: AutoModel.from_pretrained(merged),
    "classifier": lambda: AutoModelForSequenceClassification.from_pretrained(merged),
    "refusing": lambda: AutoModelForSequenceClassification.from_pretrained(
        merged, trust_remote_code=False
    ),
    "pipeline": lambda: pipeline("text-classification", model=merged),
    "auto": lambda: AutoModelForSequenceClassification.from_pretrained(adapter),
    "peft": lambda: AutoPeftModelForSequenceClassification.from_pretrained(adapter),
}
for name, attempt in refused.items() if merged else ():
    try:
        attempt()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    else:
        said[name] = "opened"
assert not any(name.partition(".")[0] == "fedlora" for name in sys.modules)
print("\\n" + json.dumps(said))
"""
"""Runs the Python of each model card, and opens an encoder's directories without consent."""


def read_elsewhere(directories, texts, tmp_path):
    """Name -> answers of a process that has only transformers and PEFT."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER],
        input=json.dumps(
            {
                "directories": {name: [str(d), str(b)] for name, (d, b) in directories.items()},
                "texts": texts,
            }
        ),
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LEARNS = {
    "training.max-length": 8,
    "federation.server-optimizer": "adam",
    "federation.server-learning-rate": 0.05,
}
"""Settings with which the tiny encoder learns in a few rounds."""


def finished(directory, **values):
    """A finished run without DP that has learned something."""
    made = config.from_flat(
        {
            "run-dir": str(directory),
            "model.dtype": "fp32",
            "data.partition": "iid",
            "data.institutions": 2,
            "training.local-steps": 1,
            "training.batch-size": 0.5,
            "federation.rounds": 6,
            "privacy.epsilon": float("inf"),
            "home.method": "none",
            **values,
        }
    )
    with run.load("inline", made), run.open_engine("inline", made) as grid:
        run.run_rounds(made, grid)
    return directory


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_encoder, complaints):
    return finished(
        tmp_path_factory.mktemp("encoder") / "run",
        **{
            "model.name": str(tiny_encoder),
            "data.source": str(complaints),
            **LEARNS,
        },
    )


def texts_of(complaints):
    with complaints.open(newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:15]


def answers(run_dir, texts):
    return [one["answer"] for one in finished_run.predict(run_dir, texts)["answers"]]


def test_a_merged_classifier_and_an_adapter_answer_elsewhere_as_here_or_do_not_open(
    classifier, complaints, tiny_encoder, tmp_path
):
    texts = texts_of(complaints)
    finished_run.merge(classifier, tmp_path / "merged")
    said = read_elsewhere(
        {
            "merged": (tmp_path / "merged", ""),
            "adapter": (classifier / "adapter", tiny_encoder),
        },
        texts,
        tmp_path,
    )
    for file in (tmp_path / "merged").glob("*.json"):
        assert str(tiny_encoder) not in file.read_text(), file
    ours = answers(classifier, texts)
    assert len(set(ours)) == 3  # else a constant answer would do
    assert said.pop("merged") == said.pop("adapter") == ours
    asking = ("config", "model", "classifier", "refusing", "pipeline")
    assert all("trust_remote_code=True" in said.pop(name) for name in asking)
    assert said.keys() == {"auto", "peft"} and "opened" not in said.values(), said


@pytest.mark.parametrize("method", ["interpolate"])
def test_an_own_model_answers_elsewhere_as_here_and_its_cards_say_that_it_must_not_leave(
    method, complaints, tiny_encoder, tmp_path
):
    run_dir = finished(
        tmp_path / "run",
        **{
            "model.name": str(tiny_encoder),
            "data.source": str(complaints),
            **LEARNS,
            "federation.rounds": 2,
            "home.method": method,
            "home.steps": 12,
        },
    )
    texts = texts_of(complaints)
    result = json.loads((run_dir / "result.json").read_text())
    name = min(result["joining"]["institutions"])
    own = run_dir / "institutions" / name / "own"
    found = finished_run.predict(run_dir, texts, name, own_model=True)["answers"]
    ours = [one["answer"] for one in found]
    assert len(set(ours)) == 3 and found != finished_run.predict(run_dir, texts)["answers"]
    work = trainable.load(config.load(run_dir / "config.toml"), tuple(result["labels"]))
    adapter = AdapterState.open(own)
    assert (adapter.rank > work.start.rank) == (method == "dual")
    finished_run.merge(run_dir, tmp_path / "merged", name, own_model=True)
    places = {"merged": (tmp_path / "merged", ""), "own": (own, tiny_encoder)}
    said = read_elsewhere(places, texts, tmp_path)
    assert said["merged"] == said["own"] == ours
    for directory in (own, tmp_path / "merged"):
        assert "must not leave" in " ".join((directory / "README.md").read_text().split())
    with pytest.raises(InputError, match=r"institution is nobody, but .* has own models of .*give"):
        finished_run.evaluate(run_dir, str(complaints), "nobody", own_model=True)


def on_merged(directory, source, **values):
    """A finished run of one round on the base ``merged`` of the directory."""
    base = {"model.name": str(directory / "merged"), "data.source": str(source)}
    short = {"training.max-length": 8, "federation.rounds": 1}
    return finished(directory / "again", **base, **short, **values)


def test_a_merged_classifier_is_a_base_model_for_fedlora(classifier, complaints, tmp_path):
    finished_run.merge(classifier, tmp_path / "merged")
    assert model_files.resolve(str(tmp_path / "merged")).positions == 64
    again = on_merged(
        tmp_path,
        complaints,
        **{
            "training.learning-rate": 1e-7,
            "federation.server-learning-rate": 1e-7,
            "federation.server-head-learning-rate": 1e-7,
        },
    )
    texts = texts_of(complaints)
    ours = answers(again, texts)
    assert ours == answers(classifier, texts)
    for run_dir, head, said in (
        (classifier, "zero", "- head from zeros\n"),
        (again, "base", "- head from the base model\n"),
    ):
        assert read_run_file(run_dir)["head"] == head
        assert said in (run_dir / "adapter" / "README.md").read_text()
    adapter = {"again": (again / "adapter", tmp_path / "merged")}
    assert read_elsewhere(adapter, texts, tmp_path)["again"] == ours


def test_a_merged_model_is_no_base_under_dp_on_the_records_that_it_was_trained_on(
    classifier, complaints, tmp_path
):
    """Its own run had no DP, and no ledger knows of it; other records are free."""
    finished_run.merge(classifier, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "This run protects nobody" in card and "differential-privacy" not in card
    known = finished_run.configuration(classifier, {})
    config = known.replace({"model.name": str(tmp_path / "merged"), "privacy.epsilon": 1.0})
    work = trainable.load(config, ("card", "fraud", "loan"))
    with pytest.raises(InputError, match="goes back to the run"):
        start_adapter(config, work)
    (tmp_path / "others.csv").write_bytes(complaints.read_bytes())
    for change in (
        {"data.source": str(tmp_path / "others.csv")},
        {"privacy.epsilon": float("inf")},
        {"privacy.noise": "seeded"},
    ):
        assert start_adapter(config.replace(change), work) is work.start
    level = {"privacy.epsilon": float("inf"), "privacy.institution-epsilon": 5.0}
    level |= {"federation.weighting": "uniform"}
    file = tmp_path / "merged" / "merged.json"
    for private in (False, True):  # no ledger adds up two runs that hide institutions
        file.write_text(json.dumps([json.loads(file.read_text())[0] | {"private": private}]))
        with pytest.raises(InputError, match="goes back to the run"):
            start_adapter(config.replace(level), work)
    in_memory = {"run": "1", "source": "memory:a", "private": False}
    file.write_text(json.dumps([in_memory]))
    with pytest.raises(InputError, match="on a table too"):
        start_adapter(config.replace({"data.source": "memory:b"}), work)
    (tmp_path / "merged" / "merged.json").write_text("{")
    with pytest.raises(InputError, match=r"merged\.json cannot be read"):
        start_adapter(config, work)


def test_a_merge_that_is_cut_short_leaves_nothing_and_mixes_with_nothing(
    classifier, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(model_card, "write_merged", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finished_run.merge(classifier, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".merged.tmp"  # of a process that was killed
    left.mkdir()
    (left / "model.safetensors").write_text("another run's")
    finished_run.merge(classifier, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.tmp", "merged"]


@pytest.fixture(scope="module")
def tiny_causal(tmp_path_factory):
    directory = tmp_path_factory.mktemp("causal")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "sft"])
def test_the_cards_of_a_causal_model_give_the_answers_of_the_run(
    task, tiny_causal, complaints, tmp_path
):
    run_dir = finished(
        tmp_path / "run",
        **{
            "model.name": str(tiny_causal),
            "model.task": task,
            "data.source": str(complaints),
            "training.max-length": 512,
            "training.batch-size": 8,
            "training.learning-rate": 0.5,
            "federation.rounds": 2,
        },
    )
    texts = texts_of(complaints)[: 15 if task == "classification" else 3]
    texts.append("a card that was lost " * 40)  # longer than 512 tokens
    finished_run.merge(run_dir, tmp_path / "merged")
    said = read_elsewhere(
        {
            "adapter": (run_dir / "adapter", tiny_causal),
            "causal": (tmp_path / "merged", ""),
        },
        texts,
        tmp_path,
    )
    ours = answers(run_dir, texts)
    assert len(set(ours)) > 1
    assert said == {"adapter": ours, "causal": ours}


def test_the_card_states_the_promise_and_no_number_of_records_under_dp(
    tiny_config, simulate_run, complaints
):
    made = tiny_config(**{"federation.rounds": 1, "training.max-length": 12})
    simulate_run(made)
    card = (Path(made.run_dir) / "adapter" / "README.md").read_text()
    privacy = json.loads((Path(made.run_dir) / "privacy.json").read_text())
    (spent, *_) = privacy["institutions"].values()
    assert privacy["protects"] in card
    assert "differential-privacy" not in card  # no tag for seeded noise
    assert f"| largest epsilon of an institution | {at_most(spent['epsilon'])} |" in card
    assert f"`{complaints.name}`" in card and str(complaints.parent) not in card
    assert "number of training records: not stated" in card
    result = json.loads((Path(made.run_dir) / "result.json").read_text())
    assert not re.search(rf"\b{result['counts']['train']}\b", card)
    assert f"| accuracy | {result['accuracy']:.4f} |" in card
    assert (
        json.loads((Path(made.run_dir) / "adapter" / "labels.json").read_text()) == result["labels"]
    )
    assert "max_length=12" in card


def test_scores_are_probabilities_of_all_classes_and_empty_texts_are_refused(
    classifier, complaints
):
    said = finished_run.predict(classifier, texts_of(complaints))["answers"]
    for one in said:
        assert sum(one["scores"].values()) == pytest.approx(1)
        assert one["score"] == max(one["scores"].values()) == one["scores"][one["answer"]]
    with pytest.raises(InputError, match="text 2 of 2 is empty"):
        finished_run.predict(classifier, ["stolen", " \n"])
    with pytest.raises(InputError, match="text 2 of 2 is a float; give a str"):
        finished_run.predict(classifier, ["stolen", float("nan")])


def test_evaluate_reads_other_columns_and_refuses_keys_of_the_model(
    classifier, complaints, tmp_path
):
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(complaints.read_text().replace("text,label,", "story,kind,", 1))
    columns = {"data.text": "story", "data.label": "kind"}
    measured = finished_run.evaluate(classifier, str(renamed), "", columns)
    assert measured == finished_run.evaluate(classifier, str(complaints))
    with pytest.raises(InputError, match=r"adapter.rank cannot be changed.*data.text"):
        finished_run.evaluate(classifier, str(renamed), "", {"adapter.rank": "4"})


def test_a_base_model_that_lies_elsewhere_now_is_named_and_must_have_the_same_weights(
    complaints, tiny_encoder, tmp_path
):
    base, texts = tmp_path / "base", texts_of(complaints)
    shutil.copytree(tiny_encoder, base)
    run_dir = finished(
        tmp_path / "run",
        **{"model.name": str(base), "data.source": str(complaints), **LEARNS},
    )
    ours = answers(run_dir, texts)
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"model.name is .*base', which is no directory here"):
        answers(run_dir, texts)
    moved = {"model.name": str(tmp_path / "moved")}
    found = finished_run.predict(run_dir, texts, "", moved)["answers"]
    assert [one["answer"] for one in found] == ours
    opened = Result(run_dir, model=tmp_path / "moved")
    assert [one["answer"] for one in opened.predict(texts)] == ours
    assert not opened.model().training
    merged = CliRunner().invoke(
        cli,
        ["merge", str(run_dir), str(tmp_path / "merged"), "--set", f"model.name={tmp_path}/moved"],
    )
    assert merged.exit_code == 0, merged.output
    file = tmp_path / "moved" / "model.safetensors"
    tensors = {name: t + 1.0 for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"is not the base that .*--set model.name=DIR"):
        finished_run.predict(run_dir, texts, "", moved)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors: tensors.popitem(), "is missing"),
        (lambda tensors: tensors.update({k: t[:1] for k, t in tensors.items()}), "has shape"),
        (lambda tensors: next(iter(tensors.values())).fill_(math.nan), "not finite"),
    ],
)
def test_an_adapter_that_was_damaged_after_the_run_is_one_clear_error(
    classifier, complaints, tmp_path, spoil, words
):
    shutil.copytree(classifier, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / WEIGHTS_FILE
    tensors = safetensors.torch.load_file(weights)
    spoil(tensors)
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    for use in (
        lambda run_dir: finished_run.evaluate(run_dir, str(complaints)),
        lambda run_dir: finished_run.predict(run_dir, ["a card"]),
        lambda run_dir: finished_run.merge(run_dir, tmp_path / "merged"),
    ):
        with pytest.raises(InputError, match=f"run/adapter does not fit .*{words}.*restore"):
            use(tmp_path / "run")

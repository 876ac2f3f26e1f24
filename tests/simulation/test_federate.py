"""Runs from Python: the same as those of the command line, on tables, with plug-ins."""

from pathlib import Path

import pandas
import pytest
import torch
import transformers

import fedlora
from fedlora import AdapterState, Collected, InputError, Round, run
from strategies.base import Strategy

ROOT = Path(__file__).parents[2]
SMALL = {
    "dtype": "fp32",
    "rounds": 2,
    "max_length": 16,
    "batch_size": 0.25,
    "delta": 1e-4,
    "noise": "seeded",
    "home_method": "none",
    "progress": False,
}


def median(this_round: Round, updates) -> AdapterState:
    everyone = Collected(updates)
    names = this_round.before.only(this_round.parts) if len(everyone) else ()
    return AdapterState({n: torch.stack(everyone.tensors(n)).median(0).values for n in names})


median_of_all = Strategy(aggregate=median)


@pytest.fixture
def small(tiny_encoder, tmp_path):
    return {**SMALL, "model": str(tiny_encoder), "out": tmp_path / "run"}


def test_a_run_on_a_frame_is_the_run_on_its_file(small, complaints, tmp_path):
    frame = pandas.read_csv(complaints)
    small |= {"partition": "natural:bank"}
    seen = []
    one = run(data=frame, on_round=seen.append, **small)
    two = run(data=str(complaints), **(small | {"out": tmp_path / "two"}))
    assert [line["round"] for line in seen] == [1, 2] and seen == one.rounds
    for name in ("accuracy", "macro_f1", "loss", "epsilon_max", "counts", "labels"):
        assert one.figures[name] == two.figures[name]
    tensors = AdapterState.open(one.adapter), AdapterState.open(two.adapter)
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert one.config.data.source.startswith("memory:")
    assert one.privacy["plug_ins"][0]["key"] == "tracking.callbacks"
    assert "plug_ins" not in two.privacy
    texts = ["stolen phishing scam", "mortgage lender"]
    said = one.predict(texts)
    assert [answer["text"] for answer in said] == texts
    tokenizer = transformers.AutoTokenizer.from_pretrained(one.adapter, trust_remote_code=False)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    scores = one.model()(**inputs).logits.softmax(-1)
    labels = one.figures["labels"]
    assert [labels[int(i)] for i in scores.argmax(-1)] == [answer["answer"] for answer in said]
    shown = repr(fedlora.Result(one.directory))
    assert "accuracy" in shown and "epsilon" in shown


def test_institutions_are_the_keys_of_a_dictionary_or_the_files_of_a_directory(
    small, complaints, tmp_path
):
    frame = pandas.read_csv(complaints)
    parts = {bank: part[["text", "label"]] for bank, part in frame.groupby("bank")}
    one = run(data=parts, **small)
    for bank, part in parts.items():
        (tmp_path / "banks").mkdir(exist_ok=True)
        part.to_csv(tmp_path / "banks" / f"{bank}.csv", index=False)
    two = run(data=tmp_path / "banks", **(small | {"out": tmp_path / "two"}))
    assert sorted(one.figures["institutions"]) == ["Alpha", "Beta", "Delta", "Gamma"]
    assert one.figures["institutions"] == two.figures["institutions"]


def wrong_shape(this_round, updates):
    list(updates)
    return {name: torch.zeros(1) for name in this_round.before}


def failing(predictions):
    return 1 / 0


@pytest.mark.parametrize(
    ("plug_in", "words"),
    [
        ({"strategy": wrong_shape}, r"federation.strategy .*wrong_shape .*does not fit.*kept"),
    ],
)
def test_a_plug_in_that_fails_is_named_and_finished_rounds_are_kept(
    small, complaints, plug_in, words
):
    with pytest.raises(fedlora.RunFailed, match=words):
        run(data=str(complaints), partition="natural:bank", **plug_in, **small)
    assert list((small["out"] / "checkpoints").iterdir())


FRAME = pandas.DataFrame({"text": ["a"], "label": ["b"], "bank": ["c"]})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epsilom": 3.0}, "epsilom is no keyword of fedlora.run; did you mean epsilon?"),
        ({"epsilon": "much"}, "privacy.epsilon is 'much'; it must be a number, above 0"),
        ({"epsilon": -1}, "privacy.epsilon is -1; it must be above 0"),
        ({"data": 7}, "data is a int; it must be a pandas.DataFrame"),
        ({"data": FRAME}, "data.partition is 'industry', but data has no such column"),
        ({"data": FRAME, "partition": "iid"}, "data.institutions"),
        ({"data": FRAME, "partition": "natural:bank", "label": "kind"}, "data.label is 'kind'"),
        ({"data": "nowhere.csv"}, "'nowhere.csv' is not a file"),
        ({"config": 7}, "config is a int"),
        ({"config": FRAME}, "config is a DataFrame; it must be the path of a TOML file, the name"),
        ({"config": FRAME}, "give records as data=..."),
        ({"run_dir": "x"}, "run_dir is no keyword of fedlora.run; did you mean out?"),
        ({"test_source": "x"}, "test_source is no keyword of fedlora.run; did you mean test_data?"),
        ({"callbacks": []}, "did you mean on_round?"),
        ({"start": Path("no/adapter")}, "adapter.start is no/adapter"),
        ({"start": Path("\0")}, "it must be Unicode text without NUL"),
        ({"config": "nothing"}, "no ready one has this name"),
        ({"engine": "gpu"}, "engine is 'gpu'"),
        ({"on_round": "plot"}, "tracking.callbacks is 'plot'; it must be module:object"),
        ({"strategy": 3}, "federation.strategy is 3; give a function"),
        ({"accept": None}, "accept is None; it must be a list of text"),
        ({"accept": "deltas"}, "accept has 'deltas'"),
        ({"target_modules": 3}, "adapter.target-modules is 3; it must be a list of text"),
        ({"labels": None}, "data.labels is None; it must be a list of text"),
        ({"labels": FRAME.label}, "data.labels is a Series; it must be a list of text"),
    ],
)
def test_bad_input_is_one_error_before_anything_is_written(small, values, words):
    with pytest.raises(InputError) as error:
        run(**(small | values))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not small["out"].exists()


def test_the_names_of_the_package_and_its_stub_are_the_same():
    stub = (ROOT / "fedlora" / "__init__.pyi").read_text()
    told = {
        line.split(" as ")[1]: line.split()[1]
        for line in stub.splitlines()
        if line.startswith("from ")
    }
    assert told == fedlora._NAMES
    assert all(getattr(fedlora, name) is not None for name in fedlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        fedlora.runn  # noqa: B018

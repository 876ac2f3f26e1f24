"""What many tests need: a tiny encoder on disk, a few records, a configuration over both."""

import csv
import gc
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

from fedlora import extras
from fedlora.startup import ENVIRONMENT, quiet_libraries
from simulation import run

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

os.umask(0o022)  # ledgers and settings in directories that a group may write are refused
quiet_libraries()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; threads that wait for others cost more

TOPICS = {
    "loan": ["mortgage", "interest", "lender", "repay", "collateral"],
    "card": ["plastic", "swipe", "chargeback", "limit", "cashback"],
    "fraud": ["stolen", "phishing", "scam", "identity", "forged"],
}
FILLER = ["the", "bank", "my", "about", "please", "account", "today", "help", "with", "a"]
BANKS = ["Alpha", "Beta", "Gamma", "Delta"]


def pytest_configure():
    """Collect no garbage while test files import libraries."""
    gc.disable()


def pytest_collection_finish():
    """Spare every later collection the millions of objects of imported libraries."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Replace surrogates in captured output: a report travels between processes as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def memory_path():
    """A temporary directory, in memory where there is one, for tests that sync often."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A directory with a random BERT of two layers and a word tokenizer, as safetensors."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({w for ws in TOPICS.values() for w in ws} | set(FILLER))
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    directory = tmp_path_factory.mktemp("tiny-encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    BertModel(
        BertConfig(vocab_size=len(vocab), max_position_embeddings=64, **size)
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def complaints(tmp_path_factory) -> Path:
    """A table of 480 short complaints to four banks, 120 each."""
    path = tmp_path_factory.mktemp("data") / "complaints.csv"
    write_complaints(path)
    return path


def write_complaints(path: Path) -> None:
    draw = random.Random(7)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "bank", "customer"])
        for i in range(480):
            topic = draw.choice(list(TOPICS))
            words = draw.choices(TOPICS[topic], k=3) + draw.choices(FILLER, k=draw.randint(2, 6))
            draw.shuffle(words)
            rows.writerow([" ".join(words), topic, BANKS[i % 4], f"c{i % 160}"])


@pytest.fixture
def tiny_config(tmp_path, tiny_encoder, complaints):
    """Makes a RunConfig over the tiny encoder and the complaints; keyword values win."""
    from fedlora.config import config

    def make(**values):
        base = {
            "run-dir": str(tmp_path / "run"),
            "model.name": str(tiny_encoder),
            "model.dtype": "fp32",
            "data.source": str(complaints),
            "data.partition": "natural:bank",
            "training.local-steps": 1,
            "training.batch-size": 0.25,
            "training.max-length": 16,
            "data.min-records": 1,
            "federation.weighting": "uniform",
            "federation.rounds": 3,
            "federation.server-optimizer": "adam",
            "federation.server-learning-rate": 0.01,
            "federation.server-head-learning-rate": 0.0,
            "privacy.noise": "seeded",
            "privacy.delta": 1e-4,
            "home.method": "none",
        }
        return config.from_flat(base | values)

    return make


@pytest.fixture
def simulate_run():
    """Runs a configuration and gives the result.json that it wrote."""

    def go(config, engine="inline"):
        with (
            run.load(engine, config),
            run.open_engine(engine, config) as grid,
        ):
            run.run_rounds(config, grid)
        return json.loads((Path(config.run_dir) / "result.json").read_text())

    return go


@pytest.fixture
def missing(monkeypatch):
    """Make packages look as if they were not installed."""

    def pretend(*packages):
        find = importlib.util.find_spec
        monkeypatch.setattr(extras, "find_spec", lambda n: None if n in packages else find(n))

    return pretend


NODE = """
import importlib, sys
from fedlora.startup import quiet_libraries
quiet_libraries()
from cli import main
for name in ("node", "home"):
    main.Commands().get_command(None, name)
for name in (
    "client.app",
    "client.dp_sgd",
    "client.home_command",
    "deployment.executor",
    "deployment.node",
    "deployment.supernode",
    "deployment.trainer",
):
    importlib.import_module(name)
print(*sys.modules)
"""
"""Imports what the processes of `fedlora node` and `fedlora home` import."""


@pytest.fixture(scope="session")
def modules_of_a_node() -> set[str]:
    """The modules that `fedlora node` and `fedlora home` load, under the user's own environment."""
    root = str(Path(__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", NODE],
        cwd=root,
        env={**environment, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def shared_data(name: str) -> Path:
    """A real data set beside the checkout; the test is skipped where there is none."""
    folder = Path(
        os.environ.get("FEDLORA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
    )
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; set FEDLORA_SHARED_DATA to where it is")
    return folder / name

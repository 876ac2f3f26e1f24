"""A federation whose training is a draw from each round's key: orders and answers are all real."""

import csv
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fedlora.config.config import RunConfig, from_flat
from fedlora.gradients import lora_layers
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from server import exchange, roster
from tests.samples import write_csv

ROWS, BANKS = 40, ("Alpha", "Beta", "Gamma")
LABELS = ("card", "fraud", "loan")


@pytest.fixture(scope="module")
def few_complaints(tmp_path_factory, complaints):
    """Forty complaints to each of three banks."""
    with complaints.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bank"] in BANKS]
    path = tmp_path_factory.mktemp("few") / "few.csv"
    write_csv(path, rows[: ROWS * len(BANKS)])
    return path


@pytest.fixture(scope="module")
def values(tiny_encoder, few_complaints) -> dict[str, Any]:
    """Flat configuration of a simulated run over these rows, without a run-dir."""
    return {
        "model.name": str(tiny_encoder),
        "model.dtype": "fp32",
        "data.source": str(few_complaints),
        "data.partition": "natural:bank",
        "data.institutions": len(BANKS),
        "data.min-records": 10,
        "training.local-steps": 1,
        "training.batch-size": 10**6,  # noise is then planned in no time
        "training.max-length": 16,
        "federation.weighting": "uniform",
        "federation.rounds": 3,
        "federation.server-optimizer": "adam",
        "federation.server-learning-rate": 0.01,
        "federation.server-head-learning-rate": 0.0,
        "home.method": "none",
        "privacy.epsilon": 3.0,
        "privacy.delta": 1e-5,
        "privacy.noise": "seeded",
    }


@pytest.fixture(scope="module")
def drawn_training() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Puts a draw in the place of training.

    Gives a function that takes what else happens: it is called with (participants, plan) before
    each private training, and may raise.
    """
    from client import private_training, training

    called: list[Callable[..., None]] = []

    def moved(work: Any, source: Any) -> AdapterState:
        """The adapter with a draw added to what is trained."""
        named, new = lora_layers.parameters(work.model), {}
        for name, tensor in AdapterState.read(work.model).items():
            if name in named and named[name].requires_grad:
                draw = torch.from_numpy(source.child(name).normal(tensor.numel()))
                tensor = tensor + 0.01 * draw.view(tensor.shape).float()
            new[name] = tensor
        return AdapterState(new)

    def train_privately(work: Any, participants: Sequence[Any], plan: Any) -> list[AdapterState]:
        for hook in called:
            hook(participants, plan)
        return [moved(work, each.source) for each in participants]

    def train(work: Any, shard: Any, plan: Any, batch: int, source: Any) -> float:
        moved(work, source).load_into(work.model)
        return 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_training, "train_privately", train_privately)
        patch.setattr(training, "train", train)

        def also(hook: Callable[..., None]) -> None:
            called[:] = [hook]

        yield also


@pytest.fixture(scope="module")
def make_config(values, drawn_training) -> Callable[..., RunConfig]:
    """Makes a `RunConfig` of ``values``; others given win."""
    drawn_training(lambda *_: None)
    return lambda **changes: from_flat(values | changes)


class Clock:
    """In the place of ``time`` where the server waits: waiting takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds, which pass when somebody sleeps."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Pass these seconds."""
        self.now += seconds


@pytest.fixture
def server_world(make_config, monkeypatch) -> dict[str, Any]:
    """Of a `ServerMachine`."""
    clock = Clock()
    for module in (exchange, roster):
        monkeypatch.setattr(module, "time", clock)
    return {"make_config": staticmethod(make_config), "clock": clock}


@pytest.fixture
def institution_world(
    values, drawn_training, few_complaints, tmp_path, monkeypatch
) -> dict[str, Any]:
    """Of an `InstitutionMachine`: Alpha's rows alone, in a process that is no simulation's."""
    records = tmp_path / "records.csv"
    lines = few_complaints.read_text().splitlines()
    records.write_text("\n".join([lines[0], *(r for r in lines if f",{BANKS[0]}," in r)]) + "\n")
    values = values | {"federation.rounds": 5}  # the machine orders rounds 1 to 4, asks for 5
    work = trainable.load(from_flat(values), LABELS)
    return {
        "values": values,
        "source": records,
        "base": work.base.digest,
        "start": work.start,
        "drawn_training": staticmethod(drawn_training),
    }

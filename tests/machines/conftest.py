"""A federation whose training is a draw from each round's key: orders and answers are all real."""

import csv
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fedlora import config as configuration
from fedlora.adapters import AdapterState

ROWS, BANKS = 40, ("Alpha", "Beta", "Gamma")


@pytest.fixture(scope="module")
def few_complaints(tmp_path_factory, complaints):
    """Forty complaints to each of three banks."""
    with complaints.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bank"] in BANKS]
    path = tmp_path_factory.mktemp("few") / "few.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[: ROWS * len(BANKS)])
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
        "training.sample-rate": 1.0,  # noise is then planned in no time
        "training.max-length": 16,
        "federation.rounds": 3,
        "federation.server-optimizer": "adam",
        "federation.server-learning-rate": 0.01,
        "federation.evaluate-every": 0,
        "privacy.epsilon": 3.0,
        "privacy.delta": 1e-5,
        "privacy.accountant": "rdp",
        "privacy.noise": "seeded",
    }


@pytest.fixture(scope="module")
def drawn_training() -> Iterator[Callable[[Callable[..., None]], None]]:
    """Puts a draw in the place of training; gives a function that says what else happens then.

    That is called with (participants, plan) before each private training, and may raise.
    """
    from client import training

    called: list[Callable[..., None]] = []

    def moved(work: Any, source: Any) -> AdapterState:
        """What was trained, a little off its start."""
        state = AdapterState.read(work.model)
        trained = {n: p for n, p in work.parameters().items() if p.requires_grad}
        kinds = {id(p) for p in trained.values()}
        import torch

        from fedlora import adapters

        named = adapters.parameters(work.model)
        new = {}
        for name, tensor in state.items():
            if name in named and id(named[name]) in kinds:
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
        patch.setattr(training, "train_privately", train_privately)
        patch.setattr(training, "train", train)

        def also(hook: Callable[..., None]) -> None:
            called[:] = [hook]

        yield also


@pytest.fixture(scope="module")
def make_config(values) -> Callable[..., configuration.RunConfig]:
    """Makes a `RunConfig` of ``values``; others given win."""
    return lambda **changes: configuration.from_flat(values | changes)

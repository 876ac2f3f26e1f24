"""The work of benchmarks/work.py with Apple's pfl: one process that keeps the model.

pfl 0.4.0 from PyPI asks for numpy below 2 and for packages that this environment has in later
versions. `benchmarks.work.pfl_python` installs it without its dependencies into a separate
environment that sees this environment's packages, so that torch, transformers and PEFT are the
same; pfl works there unchanged. bf16 autocast is pfl's own (``amp_dtype``), where the processor has
native bf16 products.

An institution's rows are padded to the longest one, since a data set of pfl is tensors. pfl
iterates over them in one order and stops after the last; here they are shuffled anew for each round
and repeated until the steps are done, as on the other sides.

Usage: PYTHON -m benchmarks.rival_pfl WORK.json (written by `benchmarks.work.Work.write`)
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional

from benchmarks import rival_model


class Shuffled(PyTorchTensorDataset):
    """An institution's rows, in as many whole batches as a round has steps."""

    def __init__(self, rows: list[rival_model.Row], name: str, steps: int, draw: Any) -> None:
        super().__init__(tuple(rival_model.collate(rows).values()), user_id=name)
        self._steps, self._draw = steps, draw

    def iter(self, batch_size: int | None) -> Iterator[list[torch.Tensor]]:
        """Batches of ``batch_size`` rows, walking through fresh permutations."""
        queue = np.empty(0, dtype=np.int64)
        for _ in range(self._steps):
            while len(queue) < batch_size:
                queue = np.concatenate([queue, self._draw.permutation(len(self))])
            rows, queue = queue[:batch_size], queue[batch_size:]
            yield [tensor[rows] for tensor in self.raw_data]


class Trained(nn.Module):
    """The model with the two methods that pfl calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        self.train()
        return functional.cross_entropy(self.model(ids, mask), labels)

    def metrics(self, *_: torch.Tensor) -> dict[str, Any]:
        """Almost no work, though pfl evaluates in the first round: accuracy comes at the end."""
        return {"batches": Weighted(1, 1)}


def main() -> None:
    """Train and print the accuracy."""
    work = json.loads(Path(sys.argv[1]).read_text())
    np.random.seed(work["seed"])
    draw = np.random.default_rng(work["seed"])
    module = rival_model.load(work)
    held = {
        name: Shuffled(rival_model.rows(path, work), name, work["steps"], draw)
        for name, path in work["shards"].items()
    }
    model = PyTorchModel(
        Trained(module),
        torch.optim.Adam,
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0),
        amp_dtype=torch.bfloat16 if work["bf16"] else None,
    )
    shards = FederatedDataset(held.__getitem__, get_user_sampler("minimize_reuse", list(held)))
    backend = SimulatedBackend(
        training_data=shards, val_data=shards, postprocessors=[WeightByDatapoints()]
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work["rounds"],
            evaluation_frequency=work["rounds"] + 1,
            train_cohort_size=len(held),
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=work["batch"],
            local_num_steps=work["steps"],
            local_num_epochs=None,
            local_learning_rate=work["learning_rate"],
        ),
    )
    held_out = rival_model.rows(work["held_out"], work)
    with model.amp_context or contextlib.nullcontext():
        print(
            json.dumps({"accuracy": rival_model.accuracy(module, held_out), "bf16": work["bf16"]})
        )


if __name__ == "__main__":
    main()

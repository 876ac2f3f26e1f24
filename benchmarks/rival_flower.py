"""The work of benchmarks/work.py as a plain Flower app, as Flower's users write one today.

Each train message loads the model, attaches the adapter, reads and tokenises the institution's
rows, and trains with PEFT in float32, as in Flower's published fine-tuning examples. Under
DP the loop is wrapped by Opacus' `PrivacyEngine` with Poisson sampling and per-sample gradients
from hooks, as in Flower's Opacus example. One ClientApp process for each worker, one core each.

Usage: python -m benchmarks.rival_flower WORK.json (written by `benchmarks.work.Work.write`)
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks import rival_model

WORK = "RIVAL_WORK"
"""Environment variable with the path of the work: ClientApps run in processes of their own."""

client = ClientApp()
server = ServerApp()


def _work() -> dict[str, Any]:
    return json.loads(Path(os.environ[WORK]).read_text())


@client.train()
def train(message: Message, context: Context) -> Message:
    """One round of an institution."""
    work = _work()
    index = int(context.node_config["partition-id"])
    number = int(message.content["config"]["server-round"])
    model = rival_model.load(work)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    rows = rival_model.rows(list(work["shards"].values())[index], work)

    seed = (work["seed"] * 1000 + number) * 1000 + index
    loader: Any = DataLoader(
        rows,  # pyright: ignore[reportArgumentType]  a list is a data set
        batch_size=work["batch"],
        shuffle=True,
        drop_last=not work["noise"],  # every step has all its rows
        collate_fn=rival_model.collate,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer: Any = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=work["learning_rate"]
    )
    trained: Any = model
    model.train()
    if work["noise"]:
        trained, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=work["noise"][index],
            max_grad_norm=work["max_grad_norm"],
        )
    batches = rival_model.endless(loader)
    for _ in range(work["steps"]):
        batch = next(batches)
        optimizer.zero_grad()
        labels = batch.pop("labels")
        functional.cross_entropy(trained(**batch), labels).backward()
        optimizer.step()

    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
    )
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over all institutions, then the accuracy on the held-out rows."""
    work = _work()
    model = rival_model.load(work)
    count = len(work["shards"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    result = strategy.start(
        grid, ArrayRecord(get_peft_model_state_dict(model)), num_rounds=work["rounds"]
    )
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    held_out = rival_model.rows(work["held_out"], work)
    print(json.dumps({"accuracy": rival_model.accuracy(model, held_out)}), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ[WORK] = str(Path(sys.argv[1]).resolve())
    todo = _work()
    run_simulation(
        server,
        client,
        num_supernodes=len(todo["shards"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": todo["workers"]},
        },
    )

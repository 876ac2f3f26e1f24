"""The model and the rows of both rivals, in plain transformers and PEFT.

The same architecture as fedlora's: the encoder in float32, LoRA on its query and value projections,
mean pooling, a linear head that starts at zero and is trained too.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer

Row = tuple[list[int], int]
Batch = dict[str, torch.Tensor]


class MeanPooled(nn.Module):
    """An encoder, the mean of its states over the mask, a linear head."""

    def __init__(self, path: str, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            path,
            dtype=torch.float32,
            add_pooling_layer=False,
            trust_remote_code=False,
            hidden_dropout_prob=0.0,  # fedlora trains without dropout
            attention_probs_dropout_prob=0.0,
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits ``(b, classes)``."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def load(work: Mapping[str, Any]) -> PeftModel:
    """The model with a fresh adapter, the same for the same seed."""
    torch.manual_seed(work["seed"])
    config = LoraConfig(
        r=work["rank"],
        lora_alpha=work["alpha"],
        target_modules=list(work["target_modules"]),
        modules_to_save=["head"],
    )
    return get_peft_model(MeanPooled(work["model"], len(work["classes"])), config)


def rows(path: str, work: Mapping[str, Any]) -> list[Row]:
    """Token ids and class of each row of a file."""
    tokenizer = AutoTokenizer.from_pretrained(work["model"], trust_remote_code=False)
    with Path(path).open(newline="") as file:
        table = list(csv.DictReader(file))
    encoded = tokenizer(
        [row["text"] for row in table], truncation=True, max_length=work["max_length"]
    )
    classes = {name: index for index, name in enumerate(work["classes"])}
    labels = [classes[row["label"]] for row in table]
    return list(zip(encoded["input_ids"], labels, strict=True))


def collate(batch: Sequence[Row]) -> Batch:
    """Rows padded to the longest of them."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.int64)  # BERT's padding is token 0
    mask = torch.zeros_like(ids)
    for i, (row, _) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    labels = torch.tensor([label for _, label in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def endless(loader: Any) -> Iterator[Batch]:
    """The batches of a loader, epoch after epoch."""
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sequence[Row]) -> float:
    """Share of rows whose class has the highest score."""
    model.eval()
    right, size = 0, 64
    for start in range(0, len(held_out), size):
        batch = collate(held_out[start : start + size])
        labels = batch.pop("labels")
        right += int((model(**batch).argmax(1) == labels).sum())
    return right / len(held_out)

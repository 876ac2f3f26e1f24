"""One training step as a user of transformers and PEFT writes it, with and without Opacus' hooks.

In float32 and in one batch. A causal model learns each row's last token, or for sft its response,
from ``labels`` without other tokens, although transformers computes the logits of every position.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import rival_model
from fedlora.models import model_files
from fedlora.models.lora import TARGETS

IGNORED = -100  # in labels, for transformers


def make(
    name: str,
    rows: Sequence[rival_model.Row],
    *,
    private: bool,
    responses: bool = False,
    device: str = "cpu",
) -> Callable[[], None]:
    """A step on all rows.

    Args:
        name: The base model, as fedlora spells it.
        rows: Token ids and class of each row, or for sft its first response position.
        private: Whether Opacus clips per-sample gradients and adds noise.
        responses: Whether a causal model learns responses.
        device: Where the model and the rows are.
    """
    files = model_files.resolve(name)
    batch = {key: value.to(device) for key, value in rival_model.collate(rows).items()}
    if files.kind == "causal":
        base = AutoModelForCausalLM.from_pretrained(
            files.path, dtype=torch.float32, trust_remote_code=False
        )
        targets = list(TARGETS[base.config.model_type])
        model: Any = get_peft_model(
            base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        )
        ids = batch["input_ids"]
        last = torch.full_like(batch["labels"], ids.shape[1] - 1)
        learned = torch.arange(ids.shape[1], device=device) >= (
            batch["labels"] if responses else last
        ).unsqueeze(1)
        batch["labels"] = ids.masked_fill(~learned, IGNORED)
    else:
        kind = AutoConfig.from_pretrained(files.path, trust_remote_code=False).model_type
        work = {
            "model": str(files.path),
            "classes": range(max(label for _, label in rows) + 1),
            "rank": 8,
            "alpha": 16.0,
            "target_modules": TARGETS[kind],
            "seed": 0,
        }
        model = rival_model.load(work)
    model.to(device).train()
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if private:
        loader = DataLoader(rows, batch_size=len(rows))  # pyright: ignore[reportArgumentType]
        model, optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,  # the step gets its batch unchanged
        )

    def step() -> None:
        optimizer.zero_grad()
        if files.kind == "causal":
            loss = model(**batch).loss
        else:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            loss = functional.cross_entropy(model(**inputs), batch["labels"])
        loss.backward()
        optimizer.step()

    return step

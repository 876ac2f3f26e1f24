"""A DP round of a Llama of 1.5 billion parameters with random weights: time, memory, bytes.

Usage: python -m benchmarks.large_model [--only label-bf16 sft-nf4] [--small]

Each line of JSON is one `fedlora run`: two institutions, LoRA of rank 16 on all linear layers, rows
of some 500 tokens, as label scoring and as sft, on a base in bf16 and in nf4, with gradient
checkpointing. A round is one private step of 8 rows at both institutions, so ``step`` is half of
it; every row is in the batch, so that the work does not vary. Memory is that of the whole tree.
``--small`` takes a tiny model and short rows: a check that everything runs.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import gpu, measure

CASES = {f"{task}-{base}": (task, base) for task in ("label", "sft") for base in ("bf16", "nf4")}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INSTITUTIONS, ROWS = 2, 8


def write_rows(path: Path, count: int, tokens: int) -> None:
    """Rows of about so many tokens, words that the tokenizer does not know, with a label."""
    draw = random.Random(count)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(count):
            words = " ".join(f"w{draw.randrange(1000)}" for _ in range(tokens - 12))
            rows.writerow([f"{number} {words}", gpu.LABELS[number % len(gpu.LABELS)]])


def settings(case: str, model: Path, data: Path, tokens: int) -> dict[str, Any]:
    """The configuration of one run."""
    task, base = CASES[case]
    return {
        "model.name": model,
        "model.task": "sft" if task == "sft" else "classification",
        "model.quantization": "nf4" if base == "nf4" else "none",
        "adapter.rank": 16,
        "adapter.target-modules": ",".join(LAYERS),
        "data.source": data,
        "data.partition": "iid",
        "data.institutions": INSTITUTIONS,
        "data.test-source": data.with_name("test.csv"),
        "data.prompt": "{text}",
        "training.local-steps": 1,
        "training.sample-rate": 1.0,
        "training.physical-batch": 1,
        "training.gradient-checkpointing": "true",
        "training.max-length": tokens,
        "federation.rounds": 1,
        "federation.evaluate-every": 0,
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-3,
        "home.method": "none",
        "engine.workers": 1,
        "engine.threads": 2,
    }


def run(values: dict[str, Any], out: Path) -> dict[str, Any]:
    """The command's wall time, a round, peak memory, and the bytes that institutions move."""
    config = out.with_suffix(".toml")
    config.write_text("seed = 1\n")
    command = [sys.executable, "-m", "cli.main", "run", str(config), "--engine", "inline", "--json"]
    command += ["--out", str(out)]
    for key, value in values.items():
        command += ["--set", f"{key}={value}"]
    found = measure.run(command)
    line: dict[str, Any] = json.loads((out / "rounds.jsonl").read_text().splitlines()[-1])
    return {
        "seconds": round(found.seconds, 1),
        "round": round(line["seconds"], 1),
        "mib": round(found.peak_mib),
        "bytes": sum(one["sent"] + one["received"] for one in line["institutions"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    sizes, tokens = (gpu.TINY, 64) if arguments.small else (gpu.LLAMA_1B, 512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpu.random_model("llama", sizes, folder / "llama", "cpu")
        write_rows(folder / "rows.csv", INSTITUTIONS * ROWS, tokens)
        write_rows(folder / "test.csv", 4, tokens)
        for case in arguments.only:
            values = settings(case, folder / "llama", folder / "rows.csv", tokens)
            found = run(values, folder / case)
            step = round(found["round"] / INSTITUTIONS, 1)
            print(json.dumps({"case": case, **found, "step": step}), flush=True)


if __name__ == "__main__":
    main()

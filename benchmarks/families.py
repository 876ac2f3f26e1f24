"""The text families of transformers under DP: a tiny model of each, examined and trained.

``python -m benchmarks.families`` builds a model of each family with random weights, loads it as a
run would, and trains private steps on rows of many lengths, some padded to as many tokens as a pass
has rows. It prints a table. A few minutes on one core.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as vocabularies
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from benchmarks import dp_step
from client import private_training, training
from fedlora.config.config import from_flat
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.data.shards import Shard
from fedlora.errors import InputError, Refusal
from fedlora.gradients import lora_layers
from fedlora.models import lora, models, trainable
from fedlora.models.encoder import HEAD
from fedlora.privacy.streams import RandomSource

RANK = 2
LABELS = ("loan", "card", "fraud", "other")
WORDS = 60
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "hidden_dim", "n_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "block_ff_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "vocab_size": WORDS,
    "pad_token_id": 1,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
}
"""Names of sizes in configurations, and their values here."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "tie_word_embeddings": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
}
"""Further values that some families need."""


@dataclass(frozen=True)
class Row:
    """One family's line of the table."""

    family: str
    kind: str
    targets: str
    verdict: str
    why: str


def families() -> list[tuple[str, str]]:
    """Model type and kind of every family that reads or writes text."""
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    encoders = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    encoders |= set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) - causal
    encoders |= {"xlnet"}
    encoders &= set(MODEL_MAPPING_NAMES)
    return [
        *((name, "encoder") for name in sorted(encoders)),
        *((name, "causal") for name in sorted(causal)),
    ]


def tiny(family: str) -> Any:
    """A small configuration of a family.

    Raises:
        ValueError: For a configuration of several models, of text and another kind of data.
    """
    known = CONFIG_MAPPING[family]()
    if any(hasattr(known, part) for part in ("vision_config", "audio_config", "text_config")):
        raise ValueError("more than a text model")
    attributes = {**known.to_dict(), **dict.fromkeys(type(known).attribute_map)}
    chosen = {name: size for name, size in SIZES.items() if name in attributes}
    return CONFIG_MAPPING[family](**{**chosen, **OVERRIDES.get(family, {})})


def build(family: str, kind: str, directory: Path) -> None:
    """Write a tiny model of a family with random weights, and a tokenizer.

    Raises:
        ValueError: For a model that is not tiny, because its sizes have names unknown here.
    """
    config = tiny(family)
    factory = AutoModelForCausalLM if kind == "causal" else AutoModel
    with torch.device("meta"):
        size = sum(
            p.numel() for p in factory.from_config(config, trust_remote_code=False).parameters()
        )
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    factory.from_config(config, trust_remote_code=False).float().save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a few words, the labels among them."""
    words = ["[UNK]", "[PAD]", *LABELS, *(f"w{i}" for i in range(WORDS - 2 - len(LABELS)))]
    made = Tokenizer(
        vocabularies.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[UNK]",
        model_max_length=64,
    )


def load(directory: Path, targets: tuple[str, ...], **values: Any) -> trainable.Trainable:
    """The model as a private run loads it.

    Raises:
        InputError, Refusal: If the model is refused.
    """
    config = from_flat(
        {
            "model.name": str(directory),
            "model.dtype": "fp32",
            "adapter.rank": RANK,
            "adapter.target-modules": ",".join(targets),
            "training.max-length": 24,
            "data.source": "unused.csv",
            **values,
        }
    )
    trainable.forget()
    return trainable.load(config, LABELS if config.model.task == "classification" else ())


def shard(labels: tuple[str, ...]) -> Shard:
    """Rows of 3 to 24 tokens; eight of them are padded to 8, as many as a pass has rows."""
    lengths = np.array([8, 7, 8, 5, 6, 8, 3, 8, *range(9, 25, 3)])
    draw = np.random.default_rng(1)
    tokens = draw.integers(6, WORDS, int(lengths.sum()), dtype=np.int32)
    ids = [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]
    targets = draw.integers(0, len(labels), len(lengths)) if labels else lengths - 2
    return shard_of(Encoded(ids=ids, targets=targets.tolist(), truncated=[False] * len(ids)))


def train(work: trainable.Trainable) -> None:
    """Two private steps.

    Raises:
        Refusal: If a guard trips.
    """
    records = shard(work.labels)
    participant = private_training.Participant(
        shard=records,
        mechanism=dp_step.mechanism(16, sample_rate=0.9, steps=2),
        source=RandomSource.seeded("families", 1),
    )
    plan = training.LocalPlan(steps=2, physical_batch=8, optimizer="sgd", learning_rate=0.5)
    private_training.train_privately(work, [participant], plan)


LIKELY = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("q", "v"),
    ("in_proj",),
)
"""Targets of families without a default of their own; the first that a model has."""
MAX_PARAMETERS = 20_000_000
"""Parameters of a model here, at most: a family whose sizes have other names is left out."""


def endings(model: Any) -> set[str]:
    """Last parts of the names of linear layers, except the output layer and the narrowest."""
    output, linear, others = model.get_output_embeddings(), set[str](), set[str]()
    for name, module in model.named_modules():
        wide = lora_layers.is_linear(module) and min(module.weight.shape) >= RANK
        trained = wide and module is not output and name != HEAD
        (linear if trained else others).add(name.rpartition(".")[2])
    return linear - others


def examined(family: str, kind: str, task: str = "classification") -> Iterator[Row]:
    """The family's lines: with the usual targets, and with all linear layers if these differ."""
    with tempfile.TemporaryDirectory() as name:
        try:
            build(family, kind, Path(name))
        except Exception as error:  # warnings of code that was not written for such small sizes
            yield Row(family, kind, "", "not built", _first(error))
            return
        options = {"dtype": "fp32", "quantization": "none", "task": task, "num_labels": len(LABELS)}
        try:
            base = models.load_base(name, **options)
        except InputError as refused:
            yield Row(family, kind, "", "refused", _reason(refused))
            return
        found = endings(base.model)
        likely = (targets for targets in LIKELY if found.issuperset(targets))
        usual = lora.TARGETS.get(base.model.config.model_type) or next(likely, ())
        for targets in dict.fromkeys((usual, tuple(sorted(found)))):
            if targets:
                yield line(family, kind, task, Path(name), targets)


def line(family: str, kind: str, task: str, directory: Path, targets: tuple[str, ...]) -> Row:
    """One line: whether the model is refused when it is loaded; if it is not, it is trained."""
    layers = ", ".join(targets)
    try:
        work = load(directory, targets, **{"model.task": task})
    except (InputError, Refusal) as refused:
        return Row(family, kind, layers, "refused", _reason(refused))
    train(work)
    rows = "padded" if work.first_position is None else "packed"
    return Row(family, kind, layers, f"exact, {rows}", "")


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _reason(error: InputError | Refusal) -> str:
    """The reason for a refusal, without the model's name and the remedy."""
    said = error.detail if isinstance(error, Refusal) else str(error)
    said = said.split("per-example gradients: ", 1)[-1]
    if said.startswith("model.name is '"):
        said = said.split("', ", 1)[1]
    return said.split(";")[0]


def table(rows: Sequence[Row]) -> str:
    """All lines as Markdown."""
    head = ["family", "kind", "adapted layers", "under DP", "why"]
    lines = [head, ["---"] * 5, *([*astuple(row)] for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def main() -> None:
    """Examine all families and print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for family, kind in families():
        for row in examined(family, kind):
            print(*astuple(row), sep=" | ", flush=True)
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()

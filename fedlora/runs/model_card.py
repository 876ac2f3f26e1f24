"""The files around an adapter or a merged model that let other programs and people open it.

They are a model card (``README.md``), the class names (``labels.json``), the tokenizer, and for an
encoder the code of its classifier (`fedlora.models.mean_pooling`). A card is a template of
``templates`` over plain values.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jinja2

from fedlora.config.config import RunConfig
from fedlora.data.encoding import LabelPrompt, PlainText, Template
from fedlora.files import sync, write_atomic
from fedlora.models import mean_pooling, models
from fedlora.models.sft import GREEDY, MAX_RESPONSE_TOKENS
from fedlora.models.trainable import Trainable
from fedlora.rounding import at_most
from fedlora.runs.run_files import finite, ledger_alone, said_of_head, said_of_origins, void

CARD, LABELS = "README.md", "labels.json"
FIGURES = ("accuracy", "macro_f1", "loss", "exact_match", "token_loss")
"""Keys of a result that a card quotes, where the result has them."""
KEPT_PART = (
    "It also holds parts that one institution kept at home. What the run promises is about the "
    "shared parts: the kept ones must not leave the institution."
)
LOADING = "## How to load"


def write_adapter(
    directory: Path,
    config: RunConfig,
    work: Trainable,
    result: Mapping[str, Any],
    privacy: Mapping[str, Any],
) -> None:
    """Write card, class names, tokenizer and code beside the files of a released adapter.

    Args:
        directory: The adapter's directory.
        config: The run.
        work: The model of the run.
        result: The content of ``result.json``.
        privacy: The content of ``privacy.json``.
    """
    for file in models.save_tokenizer(work.base.tokenizer, directory):
        sync(file)
    _write_classes(directory, work)
    _write_card(
        directory,
        "adapter",
        _values(config, work),
        library="peft",
        private=is_private(config),
        result=result,
        privacy=privacy,
        void=void(result),
        head=said_of_head(result),
        origins=said_of_origins(result),
        promises=config.privacy.enabled,
        spent=bool(privacy["institutions"]),
        local_parts=config.federation.traits.local_parts,
        source=source(config),
        figures=_privacy_figures(config, result, privacy),
        measured=[
            (key.replace("_", " "), result[key])
            for key in FIGURES
            if isinstance(result.get(key), float)
        ],
    )


def write_own(directory: Path, said: str, config: RunConfig, work: Trainable) -> None:
    """Write card, class names and code beside the files of an institution's own adapter.

    The tokenizer, which can be large, is that of the base.

    Args:
        directory: The adapter's directory.
        said: The card's first part: what the model is, and whether it may leave.
        config: The run.
        work: The model of the run.
    """
    _write_classes(directory, work)
    values = _values(config, work) | {"base_tokenizer": True}
    _write_card(directory, "own", values, said=said.rstrip())


def said_of_own(directory: Path) -> str:
    """The first part of an own adapter's card, as `write_own` took it."""
    card = (directory / CARD).read_text(encoding="utf-8")
    return card.partition(f"\n{LOADING}\n")[0].rstrip()


def write_merged(
    directory: Path, config: RunConfig, work: Trainable, said: str, *, own_model: bool
) -> None:
    """Write the card of a merged model.

    Args:
        directory: The model's directory.
        config: The run.
        work: The model of the run.
        said: What the card says on privacy; of an own model its adapter's card.
        own_model: Whether it is an institution's own model, and not the federation's.
    """
    kept = config.federation.traits.local_parts and not own_model
    _write_card(
        directory,
        "merged",
        _values(config, work) | {"merged": True},
        library="transformers",
        private=is_private(config, own_model=own_model) and not kept,
        said=said,
        own_model=own_model,
    )


def is_private(config: RunConfig, *, own_model: bool = False) -> bool:
    """Whether a run's released adapter, or an institution's own one, was made under DP.

    The local parts of an institution have no noise of the server's.
    """
    of_server = config.privacy.hides_institutions and not config.federation.traits.local_parts
    released = config.privacy.enabled or of_server
    return released and not own_model and config.privacy.noise != "seeded"


def base_name(config: RunConfig) -> str:
    """The name of the base model without the directories of this machine."""
    name = config.model.name
    named = name.startswith("package:") or _is_hub_name(name)
    return name if named else Path(name).name


def source(config: RunConfig) -> str:
    """The source of the records without the directories of this machine."""
    source = config.data.source
    return source if source.startswith(("package:", "hub:")) else Path(source).name


def _write_classes(directory: Path, work: Trainable) -> None:
    if work.labels:
        write_atomic(directory / LABELS, (json.dumps(list(work.labels)) + "\n").encode())
    if work.base.kind == "encoder":
        code = Path(mean_pooling.__file__)
        write_atomic(directory / code.name, code.read_bytes())


def _write_card(directory: Path, template: str, values: Mapping[str, Any], **more: Any) -> None:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("fedlora.runs"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card = templates.get_template(f"{template}.jinja").render(values, **more)
    write_atomic(directory / CARD, f"{card.rstrip()}\n".encode())


def _values(config: RunConfig, work: Trainable) -> dict[str, Any]:
    """What every card's text and code need."""
    base, encoding = base_name(config), work.task.encoding
    labels = list(work.labels)
    values: dict[str, Any] = {
        "config": config,
        "name": Path(config.run_dir).name,
        "purpose": "text classification" if labels else "written responses",
        "base": base,
        "on_hub": _is_hub_name(config.model.name),
        "package": base.removeprefix("package:") if base.startswith("package:") else "",
        "digest": work.base.digest,
        "dtype": work.base.dtype_name,
        "quantized": config.model.quantization != "none",
        "labels": labels,
        "max_length": config.training.max_length,
        "pooling": Path(mean_pooling.__file__).stem,
        "json": lambda value: json.dumps(finite(value)),  # pyright: ignore
        "base_tokenizer": False,
        "merged": False,
        "code_file": "encoder.jinja" if isinstance(encoding, PlainText) else "causal.jinja",
    }
    if isinstance(encoding, PlainText):
        return values
    if isinstance(encoding, LabelPrompt):
        around = encoding.layout(work.labels)[0]
        values |= {"room": config.training.max_length, "tokens": encoding.tokens(work.labels)}
    else:  # the most tokens of a prompt with its text: what a row has beside an empty response
        around, one = encoding.around(), encoding.encode(["text"], [""], ())
        values["room"] = config.training.max_length - len(one.ids[0]) + int(one.targets[0])
        values |= {"greedy": dict(GREEDY), "ends": encoding.end_tokens()}
    return values | {
        "before": repr(around.before),
        "after": repr(_after(work, around)),
        "add_special_tokens": around.add_special_tokens,
        "max_response": MAX_RESPONSE_TOKENS,
    }


def _after(work: Trainable, around: Template) -> str:
    """The string between a text and the first token of its answer.

    A blank before the answer belongs to the answer: of a class where the tokenizer joins both to
    one token, of a response always.
    """
    encoding, tokenizer = work.task.encoding, cast(Any, work.base.tokenizer)
    answer = work.labels[0] if work.labels else ""
    encoded = encoding.encode(["text"], [answer], work.labels)
    ids = encoded.ids[0] if work.labels else encoded.ids[0][: encoded.targets[0]]
    after = around.middle
    whole = tokenizer(around.before + "text" + after, add_special_tokens=around.add_special_tokens)
    return after if whole["input_ids"] == ids else after.rstrip(" ")


def _is_hub_name(name: str) -> bool:
    return (
        name.count("/") == 1
        and not name.startswith(("package:", ".", "/", "~"))
        and (not Path(name).exists())
    )


def _privacy_figures(
    config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The rows of a card's table on privacy."""
    rows: list[tuple[str, str]] = []
    if config.privacy.enabled:
        delta = "by size class" if result["delta"] is None else at_most(result["delta"], 3)
        rows.append(("largest epsilon of an institution", at_most(result["epsilon_max"])))
        rows.append(("largest delta of an institution", delta))
        if alone := result.get("epsilon_alone_max"):
            rows.append(("largest epsilon if all others collude", at_most(float(alone))))
    if spent := list(privacy["institutions"].values()):
        most = max(spent, key=lambda one: one["epsilon"])
        ledger = max(one["ledger_epsilon"] for one in spent)
        claimed = ", as institutions report" * config.deployed
        rows.append((f"largest epsilon of a ledger, all its runs{claimed}", at_most(ledger)))
        if (largest := ledger_alone(privacy)) is not None:
            collude = "the same if all others collude in runs with secure aggregation"
            rows.append((collude, at_most(largest)))
        rows += [
            ("unit", most["unit"]),
            ("adjacency", privacy["adjacency"]),
            ("adversary", privacy["adversary"]),
            ("noise", f"{most['noise']}, multiplier {most['noise_multiplier']:.4g}"),
            ("sample rate, steps", f"{most['sample_rate']:.4g}, {most['steps']}"),
        ]
    return rows

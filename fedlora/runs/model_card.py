"""The files around an adapter or a merged model that let other programs and people open it.

They are a model card (``README.md``), the class names (``labels.json``), the tokenizer, and for an
encoder the code of its classifier (`fedlora.models.mean_pooling`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fedlora.models import mean_pooling, models
from fedlora.config.config import RunConfig
from fedlora.data.encoding import LabelPrompt, PlainText, ResponsePrompt, Template
from fedlora.files import sync, write_atomic
from fedlora.rounding import at_most
from fedlora.runs.run_files import finite, ledger_alone, said_of_head, said_of_origins, void
from fedlora.models.sft import GREEDY, MAX_RESPONSE_TOKENS
from fedlora.models.trainable import Trainable

CARD, LABELS = "README.md", "labels.json"
FIGURES = ("accuracy", "macro_f1", "loss", "exact_match", "token_loss")
"""Keys of a result that a card quotes, where the result has them."""
KEPT_PART = (
    "It also holds parts that one institution kept at home. What the run promises is about the "
    "shared parts: the kept ones must not leave the institution."
)
SHARED_PART = (
    "It holds the parts that institutions share. Each institution keeps further parts at home, and "
    "without them this adapter does not give the figures below."
)
LOADING = "## How to load"
TASKS = {"classification": "text-classification", "sft": "text-generation"}


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
    parts = (
        _front_matter(config, "peft", private=is_private(config)),
        f"# {Path(config.run_dir).name}",
        f"A LoRA adapter, trained by fedlora in a federation of institutions for {_words(config)}.",
        *voided(result),
        *([SHARED_PART] if config.federation.traits.local_parts else []),
        _training(config, work, result),
        _data(config, work, result),
        _privacy(config, result, privacy),
        _figures(result),
        *_how_to_load(config, work, adapter_code(config, work)),
    )
    write_atomic(directory / CARD, ("\n\n".join(parts) + "\n").encode())


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
    code = adapter_code(config, work, tokenizer="BASE")
    card = "\n\n".join([said.rstrip(), *_how_to_load(config, work, code)])
    write_atomic(directory / CARD, f"{card}\n".encode())


def said_of_own(directory: Path) -> str:
    """The first part of an own adapter's card, as `write_own` took it."""
    card = (directory / CARD).read_text(encoding="utf-8")
    return card.partition(f"\n{LOADING}\n")[0].rstrip()


def _write_classes(directory: Path, work: Trainable) -> None:
    if work.labels:
        write_atomic(directory / LABELS, (json.dumps(list(work.labels)) + "\n").encode())
    if work.base.kind == "encoder":
        code = Path(mean_pooling.__file__)
        write_atomic(directory / code.name, code.read_bytes())


def _how_to_load(config: RunConfig, work: Trainable, code: str) -> list[str]:
    base = f"The base model is `{base_name(config)}`; SHA-256 of its weights: `{work.base.digest}`."
    return [LOADING, base, _block(code)]


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
    private = is_private(config, own_model=own_model) and not kept
    merged = f"base model `{base_name(config)}` with"
    parts = [
        _front_matter(config, "transformers", private=private),
        f"# {Path(config.run_dir).name}",
        *(
            [
                said,
                f"An institution's own model for {_words(config)}: {merged} that adapter merged "
                "into it.",
            ]
            if own_model
            else [
                f"The model of a federated run for {_words(config)}: {merged} the run's adapter "
                "merged into it.",
                f"## Privacy\n\n{said}",
            ]
        ),
    ]
    if config.model.quantization == "int8":
        parts.append(
            "The run's base was quantised to int8, which rounds activations to 8 bits too. This "
            "model has the same weights but does not round activations, so its scores differ from "
            "those that the run measured, by up to some percent of their spread."
        )
    if work.base.kind == "encoder":
        parts += [
            "It takes the mean over tokens, which no class of transformers does. The code in "
            f"`{Path(mean_pooling.__file__).name}` runs with `trust_remote_code=True`; without it "
            "transformers refuses to open this directory. Training cut texts at "
            f"{config.training.max_length} tokens, and so does this call:",
            _block(
                "from transformers import pipeline\n\n"
                'MODEL = "."  # this directory\n'
                'TEXTS = ["..."]\n'
                "classify = pipeline(\n"
                '    "text-classification", model=MODEL, tokenizer=MODEL, trust_remote_code=True\n'
                ")\n"
                f"answers = classify(TEXTS, truncation=True, "
                f"max_length={config.training.max_length})\n"
                "print(answers)"
            ),
        ]
    else:
        parts += [
            "It is a causal language model. Open it with `AutoModelForCausalLM`; "
            "`AutoModelForSequenceClassification` would put a random head on it.",
            _block(_causal_code(config, work, merged=True)),
        ]
    write_atomic(directory / CARD, ("\n\n".join(parts) + "\n").encode())


def adapter_code(config: RunConfig, work: Trainable, tokenizer: str = "") -> str:
    """Python that opens the adapter with PEFT, without fedlora, and answers ``TEXTS``.

    Args:
        config: The run.
        work: The model of the run.
        tokenizer: The variable that names the tokenizer's directory; empty: the adapter's.
    """
    if not isinstance(work.task.encoding, PlainText):
        return _causal_code(config, work, merged=False, tokenizer=tokenizer or "MODEL")
    file, tokenizer = Path(mean_pooling.__file__).stem, tokenizer or "ADAPTER"
    names, opened = _base_code(config, work, "Classifier.from_base(BASE, labels")
    if names:
        opened.append("base.classifier.to(base.device)  # bitsandbytes takes a GPU if there is one")
    imported, lines = ", ".join(["AutoTokenizer", *names, "pipeline"]), "\n".join(opened)
    packaged = "import importlib.util\n" * base_name(config).startswith("package:")
    return f"""\
{packaged}import json
from pathlib import Path

from peft import PeftModel
from transformers import {imported}
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ADAPTER = "."  # this directory
{_base_line(config)}
TEXTS = ["..."]
labels = json.loads(Path(ADAPTER, "{LABELS}").read_text())
# This runs {file}.py of this directory: no class of transformers takes the mean over tokens.
Classifier = get_class_from_dynamic_module("{file}.MeanPoolingClassifier", ADAPTER)
{lines}
model = PeftModel.from_pretrained(base, ADAPTER)
classify = pipeline(
    "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained({tokenizer})
)
answers = classify(TEXTS, truncation=True, max_length={config.training.max_length})
print(answers)"""


def _causal_code(
    config: RunConfig, work: Trainable, *, merged: bool, tokenizer: str = "MODEL"
) -> str:
    encoding = cast(LabelPrompt | ResponsePrompt, work.task.encoding)
    scored = isinstance(encoding, LabelPrompt)
    around = encoding.layout(work.labels)[0] if scored else encoding.around()
    if merged:
        head = ["import torch"]
        head += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        head += ['MODEL = "."  # this directory']
        opened = ["model = AutoModelForCausalLM.from_pretrained(MODEL)"]
    else:
        names, opened = _base_code(config, work, "AutoModelForCausalLM.from_pretrained(BASE")
        imported = ", ".join(["AutoModelForCausalLM", "AutoTokenizer", *names])
        head = ["import torch", "from peft import PeftModel"]
        if base_name(config).startswith("package:"):
            head = ["import importlib.util", "from pathlib import Path", "", *head]
        head += [f"from transformers import {imported}", ""]
        head += ['MODEL = "."  # this directory']
        head += [_base_line(config)]
        opened.append("model = PeftModel.from_pretrained(base, MODEL)")
    lines = [
        *head,
        'TEXTS = ["..."]',
        f"BEFORE, AFTER = {around.before!r}, {_after(work, around)!r}",
        f"MAX_TOKENS = {_room(config, work)}  # longer texts lose their end, as in training",
    ]
    if scored:
        lines += [
            f"LABELS = {list(work.labels)!r}",
            f"TOKENS = {encoding.tokens(work.labels)}  # the token that stands for each label",
        ]
    else:
        lines.append(f"GREEDY = {dict(GREEDY)}")
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        *opened,
        "answers = []",
        "for text in TEXTS:",
        "    prompt = BEFORE + text.strip() + AFTER",
        '    encoded = tokenizer(prompt, return_tensors="pt", '
        f"add_special_tokens={around.add_special_tokens}, return_offsets_mapping=True)",
        '    ends = encoded.pop("offset_mapping")[0, :, 1].cummax(0).values',
        "    inputs = {name: ids.to(model.device) for name, ids in encoded.items()}",
        '    if (surplus := encoded["input_ids"].shape[1] - MAX_TOKENS) > 0:',
        "        end = int((ends <= len(prompt) - len(AFTER)).sum())  # the text's last token",
        "        inputs = {",
        "            name: torch.cat([ids[:, : end - surplus], ids[:, end:]], 1)",
        "            for name, ids in inputs.items()",
        "        }",
    ]
    if scored:
        lines += [
            "    scores = model(**inputs).logits[0, -1, TOKENS]",
            "    answers.append(LABELS[int(scores.argmax())])",
        ]
    else:
        ends = encoding.end_tokens()
        lines += [
            f"    output = model.generate(**inputs, **GREEDY, eos_token_id={ends}, "
            f"max_new_tokens={MAX_RESPONSE_TOKENS})",
            '    new = output[0, inputs["input_ids"].shape[1] :]',
            "    answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())",
        ]
    return "\n".join([*lines, "print(answers)"])


def _base_line(config: RunConfig) -> str:
    """The line that assigns ``BASE``: of a package's model it finds the directory."""
    name = base_name(config)
    if not name.startswith("package:"):
        return f"BASE = {json.dumps(name)}  # its hub name or directory"
    package = name.removeprefix("package:")
    spec = f'importlib.util.find_spec("{package.replace("-", "_")}")'
    return (
        f"(folder,) = {spec}.submodule_search_locations  # pip install {package}\n"
        'BASE = str(next(Path(folder).rglob("*.safetensors")).parent)'
    )


def _room(config: RunConfig, work: Trainable) -> int:
    """The most tokens of a prompt with its text: what a row has beside an empty response."""
    if work.labels:
        return config.training.max_length
    encoded = work.task.encoding.encode(["text"], [""], ())
    return config.training.max_length - len(encoded.ids[0]) + int(encoded.targets[0])


def _base_code(config: RunConfig, work: Trainable, call: str) -> tuple[list[str], list[str]]:
    """Python that opens the base as the run did: in the same dtype, quantised alike.

    Args:
        config: The run.
        work: The model of the run.
        call: The call of ``from_pretrained`` or ``from_base`` without its options and bracket.

    Returns:
        Further names to import from transformers, and the lines that assign ``base``.
    """
    dtype, quantization = work.base.dtype_name, config.model.quantization
    if quantization == "none":
        return [], [f'base = {call}, dtype="{dtype}")']
    options = {
        "nf4": f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="{dtype}"',
        "int8": "load_in_8bit=True, llm_int8_threshold=0.0",
    }
    lines = [
        "quantized = BitsAndBytesConfig(",
        f"    {options[quantization]}",
        ")",
        f'base = {call}, dtype="{dtype}", quantization_config=quantized)',
    ]
    if quantization == "int8" and config.adapter.method.startswith("dora"):
        lines.append("# On a CPU PEFT ends with an error here: it has DoRA on int8 for GPUs only.")
    if quantization == "nf4":
        lines += [
            "for layer in base.modules():  # else bitsandbytes rounds more on some CPUs",
            "    layer.support_avx512bf16_for_cpu = False",
        ]
    return ["BitsAndBytesConfig"], lines


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


def is_private(config: RunConfig, *, own_model: bool = False) -> bool:
    """Whether a run's released adapter, or an institution's own one, was made under DP.

    The local parts of an institution have no noise of the server's.
    """
    of_server = config.privacy.hides_institutions and not config.federation.traits.local_parts
    released = config.privacy.enabled or of_server
    return released and not own_model and config.privacy.noise != "seeded"


def _front_matter(config: RunConfig, library: str, *, private: bool) -> str:
    """YAML that the hub reads; JSON texts are YAML texts."""
    lines = [f"library_name: {library}", f"pipeline_tag: {TASKS[config.model.task]}"]
    if _is_hub_name(config.model.name):
        lines.append(f"base_model: {json.dumps(config.model.name)}")
    tags = ["lora", "federated-learning"]
    if private:
        tags.append("differential-privacy")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _words(config: RunConfig) -> str:
    return "text classification" if config.model.task == "classification" else "written responses"


def _is_hub_name(name: str) -> bool:
    return (
        name.count("/") == 1
        and not name.startswith(("package:", ".", "/", "~"))
        and (not Path(name).exists())
    )


def base_name(config: RunConfig) -> str:
    """The name of the base model without the directories of this machine."""
    name = config.model.name
    named = name.startswith("package:") or _is_hub_name(name)
    return name if named else Path(name).name


def source(config: RunConfig) -> str:
    """The source of the records without the directories of this machine."""
    source = config.data.source
    return source if source.startswith(("package:", "hub:")) else Path(source).name


def _training(config: RunConfig, work: Trainable, result: Mapping[str, Any]) -> str:
    federation, adapter = config.federation, config.adapter
    return "\n".join(
        [
            "## Training",
            "",
            f"- adapter: {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}; "
            f"{result['trained_parameters']:,} trained parameters",
            *([f"- {head}"] if (head := said_of_head(result)) else []),
            f"- federation: {result['rounds']} rounds, strategy {federation.strategy}, "
            f"{config.training.local_steps} local steps",
            f"- base model: dtype {work.base.dtype_name}, quantization {config.model.quantization}",
            f"- texts cut at {config.training.max_length} tokens",
        ]
    )


def _data(config: RunConfig, work: Trainable, result: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    if config.deployed:
        lines.append("- source: records of institutions, which stayed on their machines")
    else:
        lines.append(f"- source: `{source(config)}`, partition: `{config.data.partition}`")
    lines.append(f"- columns: text `{config.data.text}`, label `{config.data.label}`")
    if config.privacy.under_dp:
        lines.append("- number of training records: not stated, since DP protects them")
    elif "train" in result["counts"]:
        lines.append(f"- training records: {result['counts']['train']:,}")
    if work.labels:
        lines += ["- classes:", "", "```json", json.dumps(list(work.labels)), "```"]
    return "\n".join(lines)


def _privacy(config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    lines = ["## Privacy", "", f"{privacy['protects']}{said_of_origins(result)}"]
    spent = list(privacy["institutions"].values())
    if config.privacy.enabled:
        delta = "by size class" if result["delta"] is None else at_most(result["delta"], 3)
        lines += [
            "",
            "| | |",
            "| --- | --- |",
            f"| largest epsilon of an institution | {at_most(result['epsilon_max'])} |",
            f"| largest delta of an institution | {delta} |",
        ]
        if alone := result.get("epsilon_alone_max"):
            lines.append(f"| largest epsilon if all others collude | {at_most(float(alone))} |")
    if spent:
        most = max(spent, key=lambda one: one["epsilon"])
        ledger = max(one["ledger_epsilon"] for one in spent)
        claimed = ", as institutions report" * config.deployed
        lines += [
            f"| largest epsilon of a ledger, all runs charged to it{claimed} | {at_most(ledger)} |",
        ]
        if (largest := ledger_alone(privacy)) is not None:
            collude = "the same if all others collude in runs with secure aggregation"
            lines.append(f"| {collude} | {at_most(largest)} |")
        lines += [
            f"| unit | {most['unit']} |",
            f"| adjacency | {privacy['adjacency']} |",
            f"| adversary | {privacy['adversary']} |",
            f"| noise | {most['noise']}, multiplier {most['noise_multiplier']:.4g} |",
            f"| sample rate, steps | {most['sample_rate']:.4g}, {most['steps']} |",
        ]
    if level := privacy.get("institution_level"):
        lines += ["", "Institution-level DP:", "", "```json", json.dumps(finite(level)), "```"]
    if config.privacy.enabled:
        lines += ["", "Models that institutions train at home from this adapter are not covered."]
    return "\n".join(lines)


def voided(result: Mapping[str, Any]) -> list[str]:
    """Paragraphs that say why a result is void; none where it is not."""
    return [f"**The result is void, and the run accepted it: {text}.**" for text in void(result)]


def _figures(result: Mapping[str, Any]) -> str:
    found = {key: result[key] for key in FIGURES if isinstance(result.get(key), float)}
    if not found:
        return "## Figures\n\nThe run measured none."
    rows = [f"| {key.replace('_', ' ')} | {value:.4f} |" for key, value in found.items()]
    return "\n".join(
        [
            "## Figures",
            "",
            "| on held-out rows, which DP does not protect | |",
            "| --- | --- |",
            *rows,
        ]
    )


def _block(code: str) -> str:
    return f"```python\n{code}\n```"

"""Small random models and tokenizers, for several files of tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from fedlora.config.sections import AdapterConfig
from fedlora.config.task_choice import choose_task
from fedlora.gradients import lora_layers
from fedlora.models import lora, tasks
from fedlora.models.models import load_base
from fedlora.models.sft import Sft

CONFIGS = {
    "bert": BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        architectures=["BertModel"],
    ),
    "llama": LlamaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128,
    ),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=32,
        bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    ),
}  # fmt: skip
IDS = torch.arange(1, 15).view(2, 7)
WORDS = "the profit fell rose flat negative neutral positive Category : Categories , ok A B C ) x"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def load(directory, quantization="none", dtype="fp32"):
    task = "classification" if directory.name == "bert" else "sft"
    return load_base(
        str(directory), dtype=dtype, quantization=quantization, task=task, num_labels=3
    )


def spec(method="lora", **changes):
    """Settings whose scaling 7/3 is no power of two.

    With one, PEFT's results and ours can agree to the last bit, and a table of zeros shows nothing.
    """
    return AdapterConfig(**{"method": method, "rank": 3, "alpha": 7.0, **changes})


def trained(base, method="lora", **changes):
    """A model in evaluation mode whose every trained value is away from its start."""
    model = lora.attach(base, spec(method, **changes), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lora_layers.parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def outputs(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def byte_tokenizer(*, chat: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, but whole tokens for the words above and for the marks of turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        parts = [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
        for left, right in parts:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
    )
    tokenizer.chat_template = chat
    return tokenizer


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")


def label_task(tokenizer: PreTrainedTokenizerFast, max_length: int = 200) -> tasks.Task:
    return choose_task("classification", "causal", tokenizer, prompt="", max_length=max_length)


def sft_task(tokenizer: PreTrainedTokenizerFast, max_length: int = 200) -> Sft:
    task = choose_task("sft", "causal", tokenizer, prompt="", max_length=max_length)
    assert isinstance(task, Sft)
    return task

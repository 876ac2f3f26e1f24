"""Tasks: losses against hand computation, no leak between rows, metrics against scikit-learn."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedlora import encoding, metrics, tasks
from fedlora.batches import collate, distinct, micro_batches, rounded
from fedlora.data import Shard
from fedlora.errors import InputError

LABELS = ("negative", "neutral", "positive")
WORDS = "the profit fell rose flat negative neutral positive Category : Categories , ok A B C ) x"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


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


def llama(vocab: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def gpt2(vocab: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@dataclass
class Output:
    logits: torch.Tensor


class MeanPooled(torch.nn.Module):
    """A stand-in for the project's encoder classifier, with its call and its output."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bert = BertModel(
            BertConfig(
                vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16, hidden_dropout_prob=0.5, initializer_range=0.5,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.classifier = torch.nn.Linear(16, classes)
        self.rows_seen = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        self.rows_seen += len(input_ids)
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return Output(self.classifier((hidden * mask).sum(1) / mask.sum(1)))


def shard(encoded: encoding.Encoded) -> Shard:
    return Shard(
        tokens=np.array([t for row in encoded.ids for t in row], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, encoded.ids)], dtype=np.int64),
        targets=np.array(encoded.targets, dtype=np.int64),
        units=np.arange(len(encoded.ids), dtype=np.int64),
    )


TEXTS = ["the profit fell", "ok", "the profit rose, the profit rose", "flat", "ok", "fell x"]
ANSWERS = ["negative", "neutral", "positive", "neutral", "positive", "negative"]


def label_task(tokenizer: PreTrainedTokenizerFast, max_length: int = 200) -> tasks.Task:
    return tasks.make("classification", "causal", tokenizer, prompt="", max_length=max_length)


def sft_task(tokenizer: PreTrainedTokenizerFast, max_length: int = 200) -> tasks.Sft:
    task = tasks.make("sft", "causal", tokenizer, prompt="", max_length=max_length)
    assert isinstance(task, tasks.Sft)
    return task


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_own_longest_row_on_the_given_side() -> None:
    rows = shard(encoding.Encoded(ids=[[5, 6, 7], [8], [9] * 9], targets=[0, 1, 2], truncated=0))
    left, right = (collate(rows, [1, 0], 3, side) for side in ("left", "right"))
    assert left.input_ids.tolist() == [[3, 3, 8], [5, 6, 7]]
    assert left.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert right.input_ids.tolist() == [[8, 3, 3], [5, 6, 7]]
    assert right.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert right.targets.tolist() == [1, 0]
    assert right.rows.tolist() == [1, 0]
    assert {t.dtype for t in vars(right).values()} == {torch.int64}


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    physical=st.integers(1, 7),
    data=st.data(),
)
def test_micro_batches_cover_each_row_once_from_long_to_short_and_keep_ties_in_order(
    lengths: list[int], physical: int, data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    batches = micro_batches(lengths, indices, physical)
    flat = [int(i) for batch in batches for i in batch]
    assert flat == sorted(indices, key=lambda i: -lengths[i])
    assert all(len(batch) == physical for batch in batches[:-1])
    assert all(0 < len(batch) <= physical for batch in batches)


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", b""])))
def test_distinct_finds_the_first_of_equal_rows(keys: list[bytes]) -> None:
    first, copy_of = distinct(keys)
    assert [keys[i] for i in first[copy_of]] == keys
    assert [keys.index(keys[i]) for i in first] == first.tolist()
    assert len(first) == len(set(keys))


# --- metrics -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "d", None]))))
def test_macro_f1_is_that_of_scikit_learn_over_the_classes_that_occur(
    rows: list[tuple[str, str | None]],
) -> None:
    truth, predicted = [t for t, _ in rows], [p for _, p in rows]
    if not rows:
        assert math.isnan(metrics.macro_f1(truth, predicted))
        return
    occurring = sorted({*truth, *predicted} - {None})
    expected = f1_score(
        truth, [p or "none" for p in predicted], labels=occurring, average="macro", zero_division=0
    )
    assert metrics.macro_f1(truth, predicted) == pytest.approx(expected)


def test_an_unparseable_answer_is_wrong_and_no_class() -> None:
    result = metrics.classification(["a", "a", "b"], ["a", None, None], ("a", "b", "c"))
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)  # a: P 1, R 1/2; c never occurs
    assert result["per_class"] == {
        "a": {"truth": 2, "predicted": 1, "correct": 1},
        "b": {"truth": 1, "predicted": 0, "correct": 0},
        "c": {"truth": 0, "predicted": 0, "correct": 0},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("positive", "positive"),
        (" Positive. It rose", "positive"),
        ("positively", None),
        ("it is positive", None),
        ("neutral positive", "neutral positive"),
        ("", None),
    ],
)
def test_an_answer_is_read_only_where_the_response_begins_with_it(
    text: str, expected: str | None
) -> None:
    assert metrics.leading_answer(text, ["positive", "neutral", "neutral positive"]) == expected


# --- encodings ---------------------------------------------------------------------------------


def test_an_encoder_text_is_cut_inside_its_frame_and_counted() -> None:
    task = tasks.make("classification", "encoder", encoder_tokenizer(), prompt="", max_length=5)
    encoded = task.encode(["a b", "a b c d e f"], ["y", "x"], ("x", "y"))
    assert encoded.ids == [[1, 4, 5, 2], [1, 4, 5, 6, 2]]
    assert encoded.targets == [1, 0]
    assert encoded.truncated == 1


@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_label_prompt_ends_where_the_answer_begins_and_never_shows_it(chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    task = tasks.make(
        "classification", "causal", tokenizer, prompt="{text} Category:", max_length=200
    )
    encoded = task.encode(["ok {x}", "flat"], ["positive", "negative"], LABELS)
    prompts = [tokenizer.decode(ids) for ids in encoded.ids]
    before, after = ("<|user|>\n", "<|end|>\n<|assistant|>\n") if chat else ("", "")
    assert prompts == [f"{before}{text} Category:{after}" for text in ("ok {x}", "flat")]
    assert encoded.ids == task.encode(["ok {x}", "flat"], ["neutral"] * 2, LABELS).ids
    assert encoded.targets == [2, 0]
    blank = "" if chat else " "
    assert isinstance(task.encoding, encoding.LabelPrompt)
    assert tokenizer.convert_ids_to_tokens(task.encoding.tokens(LABELS)) == [
        (blank + label).replace(" ", "Ġ") for label in LABELS
    ]


def test_a_prompt_is_the_same_tokens_whichever_label_would_follow() -> None:
    labels = ("positive", "zebra")  # the blank before an answer joins the first, not the second
    prompts = [
        tasks.make("classification", "causal", byte_tokenizer(), prompt=prompt, max_length=99)
        .encode(["ok"], [label], labels)
        .ids
        for prompt in ("{text} Category:", "{text} Category:  ")
        for label in labels
    ]
    assert all(ids == prompts[0] for ids in prompts)


def test_labels_that_begin_alike_become_lettered_options() -> None:
    tokenizer = byte_tokenizer()
    task = label_task(tokenizer)
    labels = ("x one", "x two", "ok")
    (ids,) = task.encode(["flat"], ["ok"], labels).ids
    assert "A) x one\nB) x two\nC) ok" in tokenizer.decode(ids)
    assert isinstance(task.encoding, encoding.LabelPrompt)
    assert tokenizer.convert_ids_to_tokens(task.encoding.tokens(labels)) == ["ĠA", "ĠB", "ĠC"]


def test_labels_that_cannot_be_scored_are_named_with_the_remedy() -> None:
    many = tuple(f"x {i}" for i in range(27))
    with pytest.raises(InputError, match=r"27 labels.*x 0, x 1.*encoder.*sft"):
        label_task(byte_tokenizer()).encode(["ok"], ["x 0"], many)
    task = tasks.make("classification", "causal", byte_tokenizer(), prompt="{text}", max_length=99)
    with pytest.raises(InputError, match=r"data.prompt has no \{labels\}.*x 0, x 1"):
        task.encode(["ok"], ["x 0"], many[:2])


@pytest.mark.parametrize("prompt", ["no place", "{text} and {text}"])
def test_a_prompt_without_exactly_one_text_is_refused(prompt: str) -> None:
    task = tasks.make("sft", "causal", byte_tokenizer(), prompt=prompt, max_length=99)
    with pytest.raises(InputError, match=r"data.prompt has \{text\} [02] times"):
        task.encode(["ok"], ["ok"], ())


def test_a_label_outside_the_label_set_is_refused() -> None:
    with pytest.raises(InputError, match="'bullish' is not one of negative, neutral, positive"):
        label_task(byte_tokenizer()).encode(["ok"], ["bullish"], LABELS)


@pytest.mark.parametrize("chat", [None, CHAT])
def test_an_sft_row_is_prompt_then_response_then_one_end_token(chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    encoded = sft_task(tokenizer).encode(["ok fell "], [" rose flat\n"], ())
    (ids,), (start,) = encoded.ids, encoded.targets
    if chat:
        assert tokenizer.decode(ids[:start]) == "<|user|>\nok fell<|end|>\n<|assistant|>\n"
        assert tokenizer.decode(ids[start:]) == "rose flat<|end|>"
    else:
        assert tokenizer.decode(ids[:start]) == "ok fell"
        assert tokenizer.decode(ids[start:]) == " rose flat<|endoftext|>"


@given(
    text=st.text(max_size=40),
    response=st.text(max_size=20),
    max_length=st.integers(20, 60),
    chat=st.sampled_from([None, CHAT]),
)
@example(text="ok", response="0000\x80\U00010000\U00010000\U00010000", max_length=20, chat=None)
def test_truncation_cuts_the_text_from_its_end_before_it_touches_the_response(
    text: str, response: str, max_length: int, chat: str | None
) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    prompt = "x {text}\n"
    long, short = (
        tasks.make("sft", "causal", tokenizer, prompt=prompt, max_length=n).encode(
            [text], [response], ()
        )
        for n in (10_000, max_length)
    )
    (full,), (cut,), full_start, start = long.ids, short.ids, long.targets[0], short.targets[0]
    assert short.truncated == (len(full) > max_length)
    assert len(cut) == min(len(full), max_length)
    removed = full_start - start
    assert cut[start:] == full[full_start:][: max_length - start]
    # What is left of the prompt is its beginning and its fixed end: one run of tokens went missing.
    left = [
        k
        for k in range(start + 1)
        if cut[:k] == full[:k] and cut[k:start] == full[k + removed : full_start]
    ]
    assert left
    if len(cut) - start < len(full) - full_start:  # the response was cut, so no text can be left
        fixed = tasks.make("sft", "causal", tokenizer, prompt=prompt, max_length=10_000)
        empty = fixed.encode([""], [response], ())
        left_over = tokenizer.decode(cut[:start])
        # but for the blank before it, which a word's first token brings along
        assert left_over.split() == tokenizer.decode(empty.ids[0][: empty.targets[0]]).split()


def test_what_goes_first_is_the_end_of_the_text_then_the_end_of_the_response() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    text, response = "fell rose flat ok x", "negative neutral positive"
    room = len(sft_task(tokenizer).encode([text], [response], ()).ids[0])

    def decoded(less: int, text: str = text) -> tuple[str, str, int]:
        encoded = sft_task(tokenizer, room - less).encode([text], [response], ())
        (ids,), (start,) = encoded.ids, encoded.targets
        return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]), encoded.truncated

    before, after = "<|user|>\n", "<|end|>\n<|assistant|>\n"
    assert decoded(0) == (before + text + after, response + "<|end|>", 0)
    assert decoded(2) == (before + "fell rose flat" + after, response + "<|end|>", 1)
    assert decoded(5) == (before + after, response + "<|end|>", 1)
    assert decoded(7) == (before + after, "negative neutral", 1)
    assert decoded(7, text="") == (before + after, "negative neutral", 1)


@pytest.mark.parametrize("make", [label_task, sft_task])
def test_a_template_longer_than_the_maximum_is_refused(make: object) -> None:
    task = make(byte_tokenizer(chat=CHAT), 4)  # type: ignore[operator]
    with pytest.raises(
        InputError, match=r"max-length leaves [34] tokens, but the prompt alone has \d+"
    ):
        task.encode(["ok"], ["positive"], LABELS)


@pytest.mark.parametrize("make", [label_task, sft_task])
def test_no_row_decides_whether_rows_can_be_encoded(make: object) -> None:
    """Where a prompt's tokens merge with a text's, the prompt needs more room beside others."""
    merging = Tokenizer(
        models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "\n": 5}, [("a", "b"), ("b", "c")])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="c")
    task = tasks.make(
        "classification" if make is label_task else "sft",
        "causal",
        tokenizer,
        prompt="{text}bc\n",
        max_length=2 if make is label_task else 3,
    )
    labels = ("a", "b") if make is label_task else ()
    for texts in (["c", "c"], ["c", "a"], ["", "a"]):
        encoded = task.encode(texts, ["b", "a"], labels)
        assert all(0 < len(ids) <= 3 for ids in encoded.ids)
        if make is sft_task:
            pairs = zip(encoded.ids, encoded.targets, strict=True)
            assert all(0 < start < len(ids) for ids, start in pairs)


@pytest.mark.parametrize("prompt", ["", "{text}"])
def test_an_sft_row_without_a_prompt_begins_with_an_end_token(prompt: str) -> None:
    tokenizer = byte_tokenizer()
    task = tasks.make("sft", "causal", tokenizer, prompt=prompt, max_length=60)
    encoded = task.encode([""], ["rose"], ())
    (ids,), (start,) = encoded.ids, encoded.targets
    assert start == 1 and tokenizer.decode(ids[start:]).strip() == "rose<|endoftext|>"


def test_impossible_choices_are_refused_before_any_model_is_loaded() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=r"data\.prompt is for causal models"):
        tasks.make("classification", "encoder", tokenizer, prompt="{text}", max_length=9)
    with pytest.raises(InputError, match=r"model\.task is sft"):
        tasks.make("sft", "encoder", tokenizer, prompt="", max_length=9)
    tokenizer.model_max_length = 64
    with pytest.raises(InputError, match="max-length is 65, but the base model takes at most 64"):
        tasks.make("sft", "causal", tokenizer, prompt="", max_length=65)
    with pytest.raises(InputError, match="max-length is 49, but the base model takes at most 48"):
        tasks.make("sft", "causal", tokenizer, prompt="", max_length=49, positions=48)


def test_the_encoding_key_changes_with_whatever_changes_the_encoding(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)

    def key(task: str = "sft", prompt: str = "", max_length: int = 50) -> str:
        return encoding.encoding_key(tmp_path, task=task, prompt=prompt, max_length=max_length)

    keys = [key(), key("classification"), key(prompt="{text}\n"), key(max_length=51)]
    assert key() == keys[0] == key(prompt="{text}")  # the default, spelled out
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    keys.append(key())
    assert len(set(keys)) == 5


# --- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_label_scoring_is_a_softmax_over_the_label_tokens_after_the_whole_prompt(
    build: object,
) -> None:
    tokenizer = byte_tokenizer()
    task = label_task(tokenizer)
    rows = shard(task.encode(TEXTS, ANSWERS, LABELS))
    model = build(len(tokenizer))  # type: ignore[operator]
    assert isinstance(task.encoding, encoding.LabelPrompt)
    tokens = task.encoding.tokens(LABELS)
    expected = []
    for i, target in enumerate(rows.targets):
        logits = model(torch.tensor(rows.row(i)[None], dtype=torch.int64)).logits[0, -1, tokens]
        expected.append(-logits.log_softmax(0)[target])
    losses = task.losses(model, task.collate(rows, range(6)), LABELS)  # padded on the left
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_sft_loss_is_the_mean_over_response_and_end_token_and_looks_nowhere_else(
    build: object,
) -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    task = sft_task(tokenizer)
    rows = shard(task.encode(TEXTS, ["rose", "ok ok ok", "x", "", "fell", "flat x"], ()))
    model = build(len(tokenizer))  # type: ignore[operator]
    computed: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, i, _o: computed.append(i[0].shape[:-1].numel()))
    losses = task.losses(model, task.collate(rows, range(6)), ())
    longest = (rows.lengths - rows.targets).max()
    assert computed == [6 * int(rounded(longest[None], 10**6)[0])]  # none for the prompts
    for i, start in enumerate(rows.targets):
        ids = torch.tensor(rows.row(i), dtype=torch.int64)
        chances = model(ids[None]).logits[0].log_softmax(-1)
        terms = [-chances[k - 1, ids[k]] for k in range(int(start), len(ids))]
        torch.testing.assert_close(losses[i], torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [label_task, sft_task])
def test_gradients_of_a_padded_batch_are_finite_and_sum_those_of_its_rows(make: object) -> None:
    tokenizer = byte_tokenizer()
    task: tasks.Task = make(tokenizer)  # type: ignore[operator]
    rows = shard(task.encode(TEXTS, ANSWERS, LABELS))
    model = llama(len(tokenizer))

    def gradients(batches: list[list[int]]) -> list[torch.Tensor]:
        model.zero_grad()
        for indices in batches:
            task.losses(model, task.collate(rows, indices), LABELS).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, alone = gradients([[0, 1, 2, 3, 4, 5]]), gradients([[i] for i in range(6)])
    assert sum(float(g.norm()) for g in together) > 0
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_encoder_losses_are_cross_entropy_of_the_logits() -> None:
    task = tasks.make("classification", "encoder", encoder_tokenizer(), prompt="", max_length=9)
    rows = shard(task.encode(["a b c", "d"], ["y", "x"], ("x", "y")))
    model = MeanPooled(2).eval()
    batch = task.collate(rows, [0, 1])
    chances = model(batch.input_ids, batch.attention_mask).logits.detach().softmax(1)
    expected = [-math.log(chances[0, 1]), -math.log(chances[1, 0])]
    assert task.losses(model, batch, ("x", "y")).tolist() == pytest.approx(expected, rel=1e-5)


# --- evaluation --------------------------------------------------------------------------------


def test_evaluation_runs_equal_rows_once_without_dropout_and_restores_each_modules_mode() -> None:
    task = tasks.make("classification", "encoder", encoder_tokenizer(), prompt="", max_length=9)
    texts = ["a b c", "d", "a b c", "e f", "d", "d"]
    truth = ["y", "x", "x", "y", "x", "y"]
    rows = shard(task.encode(texts, truth, ("x", "y")))
    model = MeanPooled(2).train()
    model.bert.eval()
    model.bert.embeddings.dropout.train()
    modes = [module.training for module in model.modules()]
    owner = np.array([0, 0, 0, 2, 2, 2])
    result = task.evaluate(model, rows, ("x", "y"), 2, owner=owner)
    assert model.rows_seen == 3
    assert [module.training for module in model.modules()] == modes
    model.eval()
    predicted = [task.predict(model, rows.select([i]), ("x", "y"))[0] for i in range(6)]
    right = np.array([t == p for t, p in zip(truth, predicted, strict=True)])
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(right.mean())
    assert result["by_owner"] == {0: right[:3].mean(), 2: right[3:].mean()}
    loss = task.losses(model, task.collate(rows, range(6)), ("x", "y")).detach().mean()
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_an_empty_shard_cannot_be_evaluated() -> None:
    task = sft_task(byte_tokenizer())
    with pytest.raises(InputError, match="0 rows to evaluate"):
        task.evaluate(llama(8), shard(task.encode([], [], ())), ())


def test_predictions_are_the_same_whatever_the_batch() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    model = llama(len(tokenizer))
    for task, labels in ((label_task(tokenizer), LABELS), (sft_task(tokenizer), ())):
        rows = shard(task.encode(TEXTS, ANSWERS, labels))
        if isinstance(task, tasks.Sft):
            said = [task._generate(model, rows, np.arange(6), n, 8) for n in (1, 4)]
        else:
            said = [task.predict(model, rows, labels, n) for n in (1, 4)]
        assert said[0] == said[1]
        assert said[0][1] == said[0][4]  # the same text twice


def test_answers_to_texts_are_labels_of_the_set() -> None:
    tokenizer = byte_tokenizer()
    answers, _ = label_task(tokenizer).answer(llama(len(tokenizer)), TEXTS, LABELS)
    assert len(answers) == 6
    assert set(answers) <= set(LABELS)


def test_sft_metrics_weigh_tokens_and_count_unparseable_answers() -> None:
    tokenizer = byte_tokenizer()
    task = sft_task(tokenizer)
    model = llama(len(tokenizer))
    rows = shard(task.encode(TEXTS, ANSWERS, ()))
    result = task.evaluate(model, rows, ())
    lengths = torch.tensor(rows.lengths - rows.targets)
    losses = task.losses(model, task.collate(rows, range(6)), ()).detach()
    token_loss = float((losses * lengths).sum() / lengths.sum())
    assert result["tokens"] == int(lengths.sum())
    assert result["token_loss"] == pytest.approx(token_loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(token_loss), rel=1e-4)
    assert (result["n"], result["generated"]) == (6, 6)
    assert result["unparseable"] == 6  # a random model babbles
    assert (result["accuracy"], result["exact_match"]) == (0.0, 0.0)


def test_pooled_metrics_are_those_of_all_rows_together() -> None:
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    for task, labels in ((label_task(tokenizer), LABELS), (sft_task(tokenizer), ())):
        rows = shard(task.encode(TEXTS, ANSWERS, labels))
        whole = task.evaluate(model, rows, labels)
        parts = [task.evaluate(model, rows.select(i), labels) for i in ([0], [1, 2], [3, 4, 5])]
        pooled = metrics.pooled(parts)
        assert pooled.keys() == whole.keys()
        for key, value in whole.items():
            assert pooled[key] == (
                pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            )


def test_a_model_that_learned_its_responses_generates_and_ends_them() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    task = sft_task(tokenizer)
    model = llama(len(tokenizer))
    texts, answers = ["fell", "rose", "flat"], ["negative", "positive", "neutral x"]
    rows = shard(task.encode(texts, answers, ()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.losses(model, task.collate(rows, [0, 1, 2]), ()).sum().backward()
        optimizer.step()
    assert task.answer(model, texts, ()) == (answers, 0)
    result = task.evaluate(model, rows, ())
    assert (result["exact_match"], result["accuracy"], result["unparseable"]) == (1.0, 1.0, 0)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=20), st.integers(700, 800))
def test_padded_sizes_are_few_never_short_and_waste_at_most_a_quarter(
    lengths: list[int], at_most: int
) -> None:
    sizes = rounded(np.array(lengths), at_most)
    assert (sizes >= lengths).all() and (sizes <= at_most).all()
    assert (sizes - lengths <= np.maximum(8, sizes / 4)).all()
    assert (rounded(sizes, at_most) == sizes).all()


def test_what_accuracy_has_to_beat_and_a_model_that_says_one_thing_only():
    classes = metrics.per_class(["a", "b", "b"], ["b", "b", "b"], ("a", "b", "c"))
    assert metrics.majority(classes) == ("b", 2 / 3)
    assert metrics.only_prediction(classes) == "b"
    assert metrics.only_prediction(metrics.per_class(["a", "b"], ["a", "b"])) is None
    assert metrics.only_prediction(metrics.per_class(["a"], ["a"])) is None

"""Tasks: losses against hand computation, no leak between rows, metrics against scikit-learn."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from fedlora.config.task_choice import choose_task
from fedlora.data import encoding
from fedlora.data.batches import rounded
from fedlora.data.data import shard_of
from fedlora.errors import InputError
from fedlora.models import metrics, tasks
from tests.fedlora.small_models import CHAT, byte_tokenizer, encoder_tokenizer, label_task, sft_task

LABELS = ("negative", "neutral", "positive")


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


def roberta(vocab: int, pad: int) -> RobertaForCausalLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=600, is_decoder=True, pad_token_id=pad,
        type_vocab_size=1, initializer_range=0.3,
    )  # fmt: skip
    return RobertaForCausalLM(config)


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


TEXTS = ["the profit fell", "ok", "the profit rose, the profit rose", "flat", "ok", "fell x"]
ANSWERS = ["negative", "neutral", "positive", "neutral", "positive", "negative"]


# --- batches -----------------------------------------------------------------------------------


# --- metrics -----------------------------------------------------------------------------------


# --- encodings ---------------------------------------------------------------------------------


def test_impossible_choices_are_refused_before_any_model_is_loaded() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=r"data\.prompt is for causal models"):
        choose_task("classification", "encoder", tokenizer, prompt="{text}", max_length=9)
    tokenizer.model_max_length = 64
    with pytest.raises(InputError, match="max-length is 65, but the base model takes at most 64"):
        choose_task("sft", "causal", tokenizer, prompt="", max_length=65)
    with pytest.raises(InputError, match="max-length is 49, but the base model takes at most 48"):
        choose_task("sft", "causal", tokenizer, prompt="", max_length=49, positions=48)


# --- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_label_scoring_is_a_softmax_over_the_label_tokens_after_the_whole_prompt(
    build: object,
) -> None:
    tokenizer = byte_tokenizer()
    task = label_task(tokenizer)
    rows = shard_of(task.encode(TEXTS, ANSWERS, LABELS))
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
    rows = shard_of(task.encode(TEXTS, ["rose", "ok ok ok", "x", "", "fell", "flat x"], ()))
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
    rows = shard_of(task.encode(TEXTS, ANSWERS, LABELS))
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_a_causal_model_reads_padded_rows_at_the_positions_that_it_gives_one_row(family) -> None:
    tokenizer = byte_tokenizer()
    pad = tokenizer.convert_tokens_to_ids("~")  # in no text here
    made = {"llama": llama, "gpt2": gpt2, "roberta": lambda n: roberta(n, pad)}[family]
    model = made(len(tokenizer)).eval()
    task = label_task(tokenizer)
    rows = shard_of(task.encode(TEXTS, ANSWERS, LABELS))
    found = task.next_token(model, task.collate(rows, range(len(rows))))
    for i in range(len(rows)):
        ids = torch.tensor(rows.row(i), dtype=torch.int64)
        alone = model(ids[None]).logits[0, -1]
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)


def test_encoder_losses_are_cross_entropy_of_the_logits() -> None:
    task = choose_task("classification", "encoder", encoder_tokenizer(), prompt="", max_length=9)
    rows = shard_of(task.encode(["a b c", "d"], ["y", "x"], ("x", "y")))
    model = MeanPooled(2).eval()
    batch = task.collate(rows, [0, 1])
    chances = model(batch.input_ids, batch.attention_mask).logits.detach().softmax(1)
    expected = [-math.log(chances[0, 1]), -math.log(chances[1, 0])]
    assert task.losses(model, batch, ("x", "y")).tolist() == pytest.approx(expected, rel=1e-5)


# --- evaluation --------------------------------------------------------------------------------


def test_evaluation_runs_equal_rows_once_without_dropout_and_restores_each_modules_mode() -> None:
    task = choose_task("classification", "encoder", encoder_tokenizer(), prompt="", max_length=9)
    texts = ["a b c", "d", "a b c", "e f", "d", "d"]
    truth = ["y", "x", "x", "y", "x", "y"]
    rows = shard_of(task.encode(texts, truth, ("x", "y")))
    model = MeanPooled(2).train()
    model.bert.eval()
    model.bert.embeddings.dropout.train()
    modes = [module.training for module in model.modules()]
    owner = np.array([0, 0, 0, 2, 2, 2])
    task.physical_batch = 2
    result = task.evaluate(model, rows, ("x", "y"), owner=owner)
    assert model.rows_seen == 3
    assert [module.training for module in model.modules()] == modes
    model.eval()
    predicted = [task.predict(model, rows.select([i]), ("x", "y"))[0][0] for i in range(6)]
    right = np.array([t == p for t, p in zip(truth, predicted, strict=True)])
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(right.mean())
    assert result["by_owner"] == {0: right[:3].mean(), 2: right[3:].mean()}
    loss = task.losses(model, task.collate(rows, range(6)), ("x", "y")).detach().mean()
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)


def _scores(task, model, rows, labels):
    """The scores of all rows at once ``(n, C)``."""
    scores = np.empty((len(rows), len(labels)), dtype=np.float32)
    for some, of_them in task._scored(model, rows, labels):
        scores[some] = of_them
    return scores


def test_answers_to_texts_are_labels_of_the_set() -> None:
    tokenizer = byte_tokenizer()
    task = label_task(tokenizer)
    rows = shard_of(task.encode(TEXTS, ANSWERS, LABELS))
    said, probabilities = task.predict(llama(len(tokenizer)), rows, LABELS)
    assert len(said) == 6
    assert set(said) <= set(LABELS)
    assert probabilities.shape == (6, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert [LABELS[i] for i in probabilities.argmax(1)] == said


def test_sft_metrics_weigh_tokens_and_count_unparseable_answers() -> None:
    tokenizer = byte_tokenizer()
    task = sft_task(tokenizer)
    model = llama(len(tokenizer))
    rows = shard_of(task.encode(TEXTS, ANSWERS, ()))
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


def test_a_model_that_learned_its_responses_generates_and_ends_them() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    task = sft_task(tokenizer)
    model = llama(len(tokenizer))
    texts, answers = ["fell", "rose", "flat"], ["negative", "positive", "neutral x"]
    rows = shard_of(task.encode(texts, answers, ()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.losses(model, task.collate(rows, [0, 1, 2]), ()).sum().backward()
        optimizer.step()
    assert task.predict(model, rows, ()) == (answers, None)
    assert not rows.corpus.truncated.any()
    result = task.evaluate(model, rows, ())
    assert (result["exact_match"], result["accuracy"], result["unparseable"]) == (1.0, 1.0, 0)
    # what a base's own generation_config.json asks for is no part of a measurement
    model.generation_config.update(
        repetition_penalty=50.0, num_beams=3, no_repeat_ngram_size=1, min_new_tokens=30,
        suppress_tokens=tokenizer("positive")["input_ids"],
    )  # fmt: skip
    assert task.evaluate(model, rows, ()) == result


def test_pooled_metrics_are_those_of_all_rows_together() -> None:
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    for task, labels in ((label_task(tokenizer), LABELS), (sft_task(tokenizer), ())):
        rows = shard_of(task.encode(TEXTS, ANSWERS, labels))
        whole = task.evaluate(model, rows, labels)
        parts = [task.evaluate(model, rows.select(i), labels) for i in ([0], [1, 2], [3, 4, 5])]
        pooled = metrics.pooled(parts)
        assert pooled.keys() == whole.keys()
        for key, value in whole.items():
            assert pooled[key] == (
                pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            )

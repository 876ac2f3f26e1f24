"""Encodings of texts and answers as tokens and targets."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlora.config.task_choice import choose_task
from fedlora.data import encoding
from fedlora.errors import InputError
from tests.fedlora.small_models import CHAT, byte_tokenizer, encoder_tokenizer, label_task, sft_task

LABELS = ("negative", "neutral", "positive")


def test_an_encoder_text_is_cut_inside_its_frame_and_counted() -> None:
    task = choose_task("classification", "encoder", encoder_tokenizer(), prompt="", max_length=5)
    encoded = task.encode(["a b", "a b c d e f"], ["y", "x"], ("x", "y"))
    assert encoded.ids == [[1, 4, 5, 2], [1, 4, 5, 6, 2]]
    assert encoded.targets == [1, 0]
    assert encoded.truncated == [False, True]


@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_label_prompt_ends_where_the_answer_begins_and_never_shows_it(chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    task = choose_task(
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
        choose_task("classification", "causal", byte_tokenizer(), prompt=prompt, max_length=99)
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


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "once",
        ),
        ("{{ messages[0]['content'] }}" * 2 + "{{ messages[1]['content'] }}", "once"),
        ("{{ messages[1]['content'] }}{{ messages[0]['content'] }}", "in this order"),
        ("{{ raise_exception('a system turn is needed') }}", "a system turn is needed"),
    ],
)
def test_a_chat_template_that_does_not_take_two_turns_of_text_is_refused(chat: str, why: str):
    with pytest.raises(InputError, match=rf"model\.name has a chat template .*{why}.*; mend"):
        encoding.template(byte_tokenizer(chat=chat), "{text}")


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


@pytest.mark.parametrize("prompt", ["{text}", "{text} ", "{text}\nAnswer:", "{text}\n"])
@pytest.mark.parametrize("chat", [None, CHAT])
def test_a_prompt_has_the_same_tokens_whatever_its_response(prompt: str, chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    task = choose_task("sft", "causal", tokenizer, prompt=prompt, max_length=99)
    responses = ["", "positive", "zebra", "7", "?"]  # the blank joins the second, not the third
    encoded = task.encode(["ok fell"] * len(responses), responses, ())
    starts = {tuple(i[:k]) for i, k in zip(encoded.ids, encoded.targets, strict=True)}
    assert len(starts) == 1
    ends = [tokenizer.decode(i[k:]) for i, k in zip(encoded.ids, encoded.targets, strict=True)]
    assert [end.strip().partition("<")[0].strip() for end in ends] == responses


@given(
    text=st.text(max_size=40),
    response=st.text(max_size=20),
    max_length=st.integers(20, 60),
    chat=st.sampled_from([None, CHAT]),
)
@example(text="A", response="0000000000000", max_length=20, chat=CHAT)
@example(text="ok", response="0000\x80\U00010000\U00010000\U00010000", max_length=20, chat=None)
def test_truncation_cuts_the_text_from_its_end_before_it_touches_the_response(
    text: str, response: str, max_length: int, chat: str | None
) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    prompt = "x {text}\n"
    long, short = (
        choose_task("sft", "causal", tokenizer, prompt=prompt, max_length=n).encode(
            [text], [response], ()
        )
        for n in (10_000, max_length)
    )
    (full,), (cut,), full_start, start = long.ids, short.ids, long.targets[0], short.targets[0]
    assert short.truncated == [len(full) > max_length]
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
        fixed = choose_task("sft", "causal", tokenizer, prompt=prompt, max_length=10_000)
        empty = fixed.encode([""], [response], ())
        left_over = tokenizer.decode(cut[:start])
        # but for the blank before it, which a word's first token brings along
        without = tokenizer.decode(empty.ids[0][: empty.targets[0]])
        assert "".join(left_over.split()) == "".join(without.split())


def test_generation_ends_at_the_mark_of_a_turn_that_other_tokens_follow() -> None:
    tokenizer = byte_tokenizer(
        chat=CHAT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    encoding = sft_task(tokenizer).encoding
    assert encoding.around().after == "<|end|>\n<|endoftext|>"
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert encoding.end_tokens() == sorted(ends)


def test_the_encoding_key_changes_with_whatever_changes_the_encoding(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)

    def key(task: str = "sft", prompt: str = "", max_length: int = 50) -> str:
        return encoding.encoding_key(tmp_path, task=task, prompt=prompt, max_length=max_length)

    keys = [key(), key("classification"), key(prompt="{text}\n"), key(max_length=51)]
    assert key() == keys[0] == key(prompt="{text}")  # the default, spelled out
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    keys.append(key())
    assert len(set(keys)) == 5

"""Encodings of texts and answers as tokens and targets."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

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


def test_labels_that_cannot_be_scored_are_named_with_the_remedy() -> None:
    many = tuple(f"x {i}" for i in range(27))
    with pytest.raises(InputError, match=r"27 labels.*x 0, x 1.*encoder.*sft"):
        label_task(byte_tokenizer()).encode(["ok"], ["x 0"], many)
    task = choose_task("classification", "causal", byte_tokenizer(), prompt="{text}", max_length=99)
    with pytest.raises(InputError, match=r"data.prompt has no \{labels\}.*x 0, x 1"):
        task.encode(["ok"], ["x 0"], many[:2])


@pytest.mark.parametrize("prompt", ["no place", "{text} and {text}"])
def test_a_prompt_without_exactly_one_text_is_refused(prompt: str) -> None:
    task = choose_task("sft", "causal", byte_tokenizer(), prompt=prompt, max_length=99)
    with pytest.raises(InputError, match=r"data.prompt has \{text\} [02] times"):
        task.encode(["ok"], ["ok"], ())


def test_a_label_outside_the_label_set_is_refused() -> None:
    with pytest.raises(InputError, match="'bullish' is not one of negative, neutral, positive"):
        label_task(byte_tokenizer()).encode(["ok"], ["bullish"], LABELS)


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


def test_what_goes_first_is_the_end_of_the_text_then_the_end_of_the_response() -> None:
    tokenizer = byte_tokenizer(chat=CHAT)
    text, response = "fell rose flat ok x", "negative neutral positive"
    room = len(sft_task(tokenizer).encode([text], [response], ()).ids[0])

    def decoded(less: int, text: str = text) -> tuple[str, str, int]:
        encoded = sft_task(tokenizer, room - less).encode([text], [response], ())
        (ids,), (start,) = encoded.ids, encoded.targets
        return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:]), encoded.truncated[0]

    before, after = "<|user|>\n", "<|end|>\n<|assistant|>\n"
    assert decoded(0) == (before + text + after, response + "<|end|>", 0)
    assert decoded(2) == (before + "fell rose flat" + after, response + "<|end|>", 1)
    assert decoded(5) == (before + after, response + "<|end|>", 1)
    assert decoded(7) == (before + after, "negative neutral", 1)
    assert decoded(7, text="") == (before + after, "negative neutral", 1)


def test_a_prompt_has_the_same_date_on_every_day() -> None:
    calls = ("strftime_now('%d %B %Y')", 'strftime_now(format="%d %B %Y")', "date_string")
    for dated in (f"{{{{ {call} }}}}" for call in calls):
        encoded = [
            sft_task(byte_tokenizer(chat=day + CHAT)).encode(["fell"], ["rose"], ()).ids[0]
            for day in (dated, "01 January 2025" if "now" in dated else "01 Jan 2025")
        ]
        assert encoded[0] == encoded[1]
    unknown = "{% set f = '%d' %}{{ strftime_now(f) }}" + CHAT
    with pytest.raises(InputError, match="today's date in a format that is no text"):
        sft_task(byte_tokenizer(chat=unknown)).encode(["fell"], ["rose"], ())


def test_generation_ends_at_the_mark_of_a_turn_that_other_tokens_follow() -> None:
    tokenizer = byte_tokenizer(
        chat=CHAT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    encoding = sft_task(tokenizer).encoding
    assert encoding.around().after == "<|end|>\n<|endoftext|>"
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert encoding.end_tokens() == sorted(ends)


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
    task = choose_task(
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
    task = choose_task("sft", "causal", tokenizer, prompt=prompt, max_length=60)
    encoded = task.encode([""], ["rose"], ())
    (ids,), (start,) = encoded.ids, encoded.targets
    assert start == 1 and tokenizer.decode(ids[start:]).strip() == "rose<|endoftext|>"


def test_the_encoding_key_changes_with_whatever_changes_the_encoding(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)

    def key(task: str = "sft", prompt: str = "", max_length: int = 50) -> str:
        return encoding.encoding_key(tmp_path, task=task, prompt=prompt, max_length=max_length)

    keys = [key(), key("classification"), key(prompt="{text}\n"), key(max_length=51)]
    assert key() == keys[0] == key(prompt="{text}")  # the default, spelled out
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    keys.append(key())
    assert len(set(keys)) == 5

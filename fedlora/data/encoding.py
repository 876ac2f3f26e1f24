"""Texts to tokens, one encoding per task; nothing here imports torch or transformers.

An encoding turns (text, answer) into the ids a model reads and the target of the row. The causal
encodings render a prompt around the text, inside the tokenizer's chat template if there is one, and
tokenise the whole string once. Character offsets then show the tokens of the text (the only part
that may be cut when a row is too long) and the start of the answer.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from fedlora.errors import InputError, RecordError

DATE = date(2025, 1, 1)
TODAY = re.compile(
    r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)"""
)
"""A template's call for today's date; no function can be given to a template in its place."""
CHUNK = 1000  # rows tokenised at a time: offsets of many rows would not fit into memory
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LABEL_PROMPT = (
    "Which category fits this financial text best?\n\nText: {text}\n\nCategories: {labels}\n\n"
    "Category:"
)
RESPONSE_PROMPT = "{text}"
_T = TypeVar("_T")
_TEXT, _ANSWER = "@@fedlora-text@@", "@@fedlora-answer@@"
_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenised rows.

    Args:
        ids: Token ids of each row, at most ``max_length`` of them.
        targets: Class index of each row, or for sft the position of its first response token.
        truncated: Whether each row was too long and was cut.
    """

    ids: list[list[int]]
    targets: list[int]
    truncated: list[bool]


def encoding_key(directory: Path, *, task: str, prompt: str, max_length: int) -> str:
    """Digest of everything that changes an encoding, except the labels: a key for cached shards.

    Args:
        directory: The directory of the model's ``config.json`` and tokenizer files.
        task: The value of ``model.task``.
        prompt: The value of ``data.prompt``; empty for the task's own prompt.
        max_length: ``training.max-length``, in tokens.

    Returns:
        SHA-256, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    default = LABEL_PROMPT if task == "classification" else RESPONSE_PROMPT
    digest.update(json.dumps([task, prompt or default, max_length]).encode())
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"model.name has no tokenizer.json in {directory}; save its tokenizer in fast form "
            "(AutoTokenizer.from_pretrained(...).save_pretrained) or use another model"
        )
    for name in _FILES:
        file = directory / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def class_index(answers: Sequence[str], labels: tuple[str, ...]) -> list[int]:
    """Index of each answer among the labels; InputError for an answer that is none of them."""
    index = {label: i for i, label in enumerate(labels)}
    for answer in answers:
        if answer not in index:
            raise RecordError(
                f"label {answer!r} is not one of {', '.join(labels)}; "
                "add it to data.labels or drop these rows"
            )
    return [index[answer] for answer in answers]


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """Texts with the special tokens of an encoder ([CLS] text [SEP]), cut at ``max_length``."""

    tokenizer: Any
    max_length: int

    def encode(
        self, texts: Sequence[str], answers: Sequence[str], labels: tuple[str, ...]
    ) -> Encoded:
        """Tokenises texts; the targets are class indices."""
        ids: list[list[int]] = []
        truncated: list[bool] = []
        for rows in _chunks(texts):
            batch = self.tokenizer(list(rows), truncation=True, max_length=self.max_length)
            ids.extend(batch["input_ids"])
            truncated.extend(bool(row.overflowing) for row in batch.encodings)
        return Encoded(ids=ids, targets=class_index(answers, labels), truncated=truncated)


@dataclass(frozen=True, kw_only=True)
class Template:
    """The fixed strings around a text and its answer: ``before + text + middle + answer + after``.

    Args:
        before: The string up to the text.
        middle: The string between text and answer; a plain prompt ends with a newline or a blank.
        after: The mark that ends an answer, such as ``<|im_end|>``.
        add_special_tokens: Whether the tokenizer adds special tokens; a chat template has them.
    """

    before: str
    middle: str
    after: str
    add_special_tokens: bool


def template(tokenizer: Any, prompt: str) -> Template:
    """Takes the strings around text and answer from the tokenizer's chat template.

    A chat template is rendered once, with the prompt as the user's turn and a mark as the
    assistant's, so that the template's text before an answer (a header, an empty thought) is in
    ``middle``. Without a template the prompt is used as it is, and the end-of-text token ends an
    answer.

    Raises:
        InputError: If the prompt does not hold ``{text}`` exactly once, or the chat template does
            not take the two turns.
    """
    if prompt.count("{text}") != 1:
        raise InputError(
            f"data.prompt has {{text}} {prompt.count('{text}')} times, and needs it exactly once; "
            "write it where a record's text belongs"
        )
    if _TEXT in prompt or _ANSWER in prompt:
        raise InputError(
            f"data.prompt has {_TEXT} or {_ANSWER}, which are reserved markers; drop them"
        )
    marked = prompt.replace("{text}", _TEXT)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": marked}, {"role": "assistant", "content": _ANSWER}]
        before, middle, after = _rendered(tokenizer, turns)
        after = after.strip() or tokenizer.eos_token
    else:
        before, rest = marked.split(_TEXT)
        middle = rest.rstrip(" ")
        middle, after = middle + ("" if middle.endswith("\n") else " "), tokenizer.eos_token
    return Template(
        before=before,
        middle=middle,
        after=after or "",
        add_special_tokens=not tokenizer.chat_template,
    )


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[str, str, str]:
    """What the chat template writes before the text, between text and answer, and after it."""
    why = "it does not write both once, in this order"
    try:
        # Templates insert today's date, but all institutions, and a resumed run, see one prompt.
        frozen = TODAY.sub(
            lambda call: repr(DATE.strftime(call["format"])), tokenizer.get_chat_template()
        )
        if re.search(r"strftime_now\s*\(", frozen):
            raise ValueError("it writes today's date in a format that is no text")
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=frozen, tokenize=False, date_string="01 Jan 2025"
        )
    except Exception as error:  # a template raises what it likes
        rendered, why = "", " ".join(str(error).split())[:120] or type(error).__name__
    before, text, rest = rendered.partition(_TEXT)
    middle, answer, after = rest.partition(_ANSWER)
    if not (text and answer) or any(mark in before + middle + after for mark in (_TEXT, _ANSWER)):
        raise InputError(
            "model.name has a chat template that does not take a turn of the user and one of the "
            f"assistant, each a text: {why}; mend chat_template in the directory of the base model,"
            " or remove it there, so that data.prompt is used as it is"
        )
    return before, middle, after


@dataclass(frozen=True, kw_only=True)
class _Row:
    ids: list[int]
    text: tuple[int, int]  # tokens [start, end) of the text alone
    answer: int  # first token of the answer


def _compose(
    tokenizer: Any,
    around: Template,
    texts: Sequence[str],
    answers: Sequence[str],
    *,
    with_blank: bool = False,
) -> Iterator[_Row]:
    """Tokenises whole rows; texts and answers lose the blanks around them.

    ``with_blank`` makes the blank before an answer part of it. Whether a tokenizer joins both to
    one token depends on the answer, which a prompt that is to be answered does not know.
    """
    middle = around.middle.rstrip(" ") if with_blank else around.middle
    pairs = [(text.strip(), answer.strip()) for text, answer in zip(texts, answers, strict=True)]
    for rows in _chunks(pairs):
        batch = tokenizer(
            [
                f"{around.before}{text}{around.middle}{answer}{around.after}"
                for text, answer in rows
            ],
            add_special_tokens=around.add_special_tokens,
            return_offsets_mapping=True,
        )
        for (text, _), ids, offsets in zip(
            rows, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            ends = list(accumulate((end for _, end in offsets), max))
            start = len(around.before)
            # A token belongs to the part that holds its last character.
            yield _Row(
                ids=ids,
                text=(bisect_right(ends, start), bisect_right(ends, start + len(text))),
                answer=bisect_right(ends, start + len(text) + len(middle)),
            )


def _cut_text(row: _Row, surplus: int) -> _Row:
    """Drops up to ``surplus`` tokens from the end of the text; none if ``surplus`` is 0 or less."""
    start, end = row.text
    cut = min(max(surplus, 0), end - start)
    if cut == 0:
        return row
    return _Row(
        ids=row.ids[: end - cut] + row.ids[end:], text=(start, end - cut), answer=row.answer - cut
    )


def _check_room(tokenizer: Any, around: Template, answer: str, room: int) -> None:
    """Refuse a prompt that is too long by itself.

    The check reads no record: a server must not learn whether a row fits, and the number of tokens
    of a prompt beside a text depends on the row. A row that is too long is cut.

    Raises:
        InputError: If the prompt alone has more tokens than ``room``.
    """
    (row,) = _compose(tokenizer, around, ["text"], [answer])
    needed = _cut_text(row, len(row.ids)).answer
    if needed > room:
        raise InputError(
            f"training.max-length leaves {room} tokens, but the prompt alone has {needed}; raise "
            "it or shorten data.prompt"
        )


@dataclass(frozen=True, kw_only=True)
class LabelPrompt:
    """A prompt whose next token names the class.

    That token is the first one of the label when these differ between all labels; otherwise the
    prompt lists lettered options and the letters are scored.
    """

    tokenizer: Any
    prompt: str
    max_length: int

    def encode(
        self, texts: Sequence[str], answers: Sequence[str], labels: tuple[str, ...]
    ) -> Encoded:
        """Tokenises prompts up to the answer; the targets are class indices.

        Every row is composed with the same answer, which is then cut off, so ids reveal no label.
        """
        around, options = self.layout(labels)
        _check_room(self.tokenizer, around, options[0], self.max_length)
        ids: list[list[int]] = []
        truncated: list[bool] = []
        for row in _compose(self.tokenizer, around, texts, [options[0]] * len(texts)):
            kept = _cut_text(row, row.answer - self.max_length)
            truncated.append(row.answer > self.max_length)
            ids.append(kept.ids[: min(kept.answer, self.max_length)])
        return Encoded(ids=ids, targets=class_index(answers, labels), truncated=truncated)

    def tokens(self, labels: tuple[str, ...]) -> list[int]:
        """The token that stands for each label, all different."""
        return self._first_tokens(*self.layout(labels))

    def layout(self, labels: tuple[str, ...]) -> tuple[Template, Sequence[str]]:
        """The strings around a text, and the scored answers: labels or letters.

        Raises:
            InputError: If neither labels nor letters can be told apart by one token.
        """
        words = template(self.tokenizer, self.prompt.replace("{labels}", ", ".join(labels)))
        tokens = self._first_tokens(words, labels)
        if len(set(tokens)) == len(labels):
            return words, labels
        often = Counter(tokens)
        alike = [label for label, token in zip(labels, tokens, strict=True) if often[token] > 1]
        named = ", ".join(alike[:6]) + (", ..." if len(alike) > 6 else "")
        if len(labels) > len(LETTERS):
            raise InputError(
                f"{len(labels)} labels cannot be scored by one token: {named} begin with the same "
                f"token, and lettered options end at {len(LETTERS)}; give labels that begin "
                "differently, use an encoder, or set model.task to sft"
            )
        if "{labels}" not in self.prompt:
            raise InputError(
                f"data.prompt has no {{labels}}, but the labels {named} begin with the same token "
                "and need lettered options; write {labels} where the options belong"
            )
        letters = LETTERS[: len(labels)]
        listed = "\n".join(f"{a}) {label}" for a, label in zip(letters, labels, strict=True))
        return template(self.tokenizer, self.prompt.replace("{labels}", "\n" + listed)), letters

    def _first_tokens(self, around: Template, answers: Sequence[str]) -> list[int]:
        rows = _compose(self.tokenizer, around, ["text"] * len(answers), answers)
        return [row.ids[row.answer] for row in rows]


@dataclass(frozen=True, kw_only=True)
class ResponsePrompt:
    """A prompt and the whole response with its end mark (instruction tuning)."""

    tokenizer: Any
    prompt: str
    max_length: int

    def encode(
        self, texts: Sequence[str], answers: Sequence[str], labels: tuple[str, ...]
    ) -> Encoded:
        """Tokenises pairs; the targets are the positions of the first response tokens (1 or more).

        A row that is too long loses the end of its text, and only when no text is left the end of
        its response. Where a row's prompt has no token of its own, an end token takes its place.
        The blank before a response belongs to it, so that the ids of a prompt that is not cut do
        not depend on the response. ``labels`` is not used.
        """
        around = self.around()
        _check_room(self.tokenizer, around, "text", self.max_length - 1)
        (first, *_) = self.end_tokens() or [0]
        ids: list[list[int]] = []
        targets: list[int] = []
        truncated: list[bool] = []
        for row in _compose(self.tokenizer, around, texts, answers, with_blank=True):
            kept = _cut_text(row, len(row.ids) - self.max_length)
            own = kept.ids if kept.answer else [first, *kept.ids]
            truncated.append(len(row.ids) > self.max_length)
            ids.append(own[: self.max_length])
            targets.append(min(max(kept.answer, 1), self.max_length - 1))
        return Encoded(ids=ids, targets=targets, truncated=truncated)

    def end_tokens(self) -> list[int]:
        """Tokens at which generation stops.

        The first token of the end mark that was added to the vocabulary, as marks of turns are, its
        last one, and the tokenizer's own.
        """
        mark = self.tokenizer(self.around().after, add_special_tokens=False)["input_ids"]
        added = [i for i in mark if i in self.tokenizer.added_tokens_decoder]
        own = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return sorted({*added[:1], *mark[-1:], *own})

    def around(self) -> Template:
        """The strings around a text and its response."""
        return template(self.tokenizer, self.prompt)


def _chunks(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK))

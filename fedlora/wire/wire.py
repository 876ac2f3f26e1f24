"""Messages as Flower's records. Record keys are spelled here only.

Importing this module loads no torch: an engine starts its workers before torch is loaded.
"""

import contextlib
import dataclasses
import json
import math
import re
import secrets
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

import fedlora
from fedlora.arrays import Int64
from fedlora.errors import Refusal
from fedlora.models.model_files import Origin, origins_of
from fedlora.runs.run_files import RUN_NAME
from fedlora.secure.secure_aggregation import MAX_TEXT_CHARACTERS, MaskedOrder, SecureMessage
from fedlora.wire.messages import (
    ClientUpdate,
    EvaluateOrder,
    Evaluation,
    Hello,
    PrivacySpent,
    Query,
    Release,
    TrainOrder,
)

if TYPE_CHECKING:
    import mmap

    import torch

    from fedlora.models.adapters import AdapterState

_T = typing.TypeVar("_T")
_Order = typing.TypeVar("_Order", "TrainOrder", "EvaluateOrder", "Release")
_Secure = typing.TypeVar("_Secure", bound=SecureMessage)

HOME = f"{MessageType.EVALUATE}.home"
"""Message type of an `EvaluateOrder` that asks for the models that are trained at home."""
RELEASED = f"{MessageType.EVALUATE}.released"
"""Message type of a `Release`."""
KEYS, SHARES, LIST, UNMASK = (
    f"{MessageType.QUERY}.{action}" for action in ("keys", "shares", "list", "unmask")
)
"""Message types of secure aggregation, beside a `TrainOrder` that holds a masked order."""
_SAFETENSORS = "safetensors"
_INT64, _RAW = "<i8", "raw"
MAX_HEADER_BYTES = 2**20
"""Bytes of names and shapes in an adapter's file. A thousand tensors take some 0.2 MB. Each tensor
that a header names takes memory before it is compared with anything."""
MAX_LIST_TEXTS = 16
"""Texts in a list of an order: its parts, its local parts, the requested figures."""
MAX_ORIGINS_CHARACTERS = 2**18
"""Characters of a release's origins as JSON: some thousand runs."""
MAX_EVALUATION_CHARACTERS = 2**20
"""Characters of an evaluation's figures as JSON: some thousand classes."""
CHARACTERS_OF_A_ROW = 30
"""Further characters for a row's predictions by three models, of up to 10,000,000 classes."""
_CODE = re.compile(r"[a-z0-9-]{1,64}")
_PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: f"a text of at most {MAX_TEXT_CHARACTERS} characters",
    bool: "true or false",
    tuple[str, ...]: f"a list of at most {MAX_LIST_TEXTS} texts",
}
_ADAPTER, _WORDS, _ORDER, _UPDATE = "adapter", "words", "order", "update"
_PRIVACY, _METRICS, _REFUSED, _HELLO = "privacy", "metrics", "refused", "hello"
_QUERY, _EVALUATION, _SECURE = "query", "evaluation", "secure"
_NONCE = "nonce"
"""In each record: a value that no other party knows beforehand (`_record`)."""
_VERSION = "version"
"""In the first record of each message of the server: its version, whatever else the message has."""


def pack_adapter(state: "AdapterState") -> ArrayRecord:
    """An adapter as one array, whose bytes are a safetensors file.

    Flower stores and sends each array of a message as two objects, with a request for each. An
    adapter of some hundred tensors took longer to send than to train.
    """
    data = _blob(state, {_NONCE: secrets.token_hex(16)})
    return ArrayRecord({_ADAPTER: Array("uint8", (len(data),), _SAFETENSORS, data)})


def _blob(state: "Mapping[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> bytes:
    import safetensors.torch

    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(tensors, metadata)


def _state(blob: "bytes | mmap.mmap") -> "AdapterState":
    """The adapter in the bytes of a safetensors file.

    Its tensors are views of a mapped file, and otherwise of one copy of the bytes. The checks are
    those of safetensors: every byte belongs to one tensor, whose shape and type give its size.

    Raises:
        Exception: Of any kind, for bytes that are no such file.
    """
    import torch

    from fedlora.models.adapters import AdapterState

    whole = memoryview(blob)
    begin = 8 + int.from_bytes(whole[:8], "little")
    header: dict[str, Any] = json.loads(bytes(whole[8:begin]))
    header.pop("__metadata__", None)
    if begin % 8:
        raise ValueError("its header does not end at a multiple of 8 bytes")
    data = bytearray(whole[begin:]) if whole.readonly else whole[begin:]
    tensors: dict[str, torch.Tensor] = {}
    end = 0
    for name, about in sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]):
        (first, last), shape = about["data_offsets"], about["shape"]
        if about["dtype"] != "F32":
            raise ValueError(f"{name} is {about['dtype']}, not F32")
        if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
            raise ValueError(f"{name} has no shape or place")
        if first != end or last - first != 4 * math.prod(shape) or last > len(data):
            raise ValueError(f"{name} has shape {shape} at {first} to {last}")
        end = last
        tensors[name] = (
            torch.frombuffer(data, dtype=torch.float32, count=(last - first) // 4, offset=first)
            if last > first
            else torch.empty(0)
        ).reshape(shape)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes belong to no tensor")
    return AdapterState(tensors)


def _plain(package: Any, *skip: str) -> ConfigRecord:
    fields = [f.name for f in dataclasses.fields(package) if f.name not in skip]
    values = {name: getattr(package, name) for name in fields}
    return _record(
        {k: list(typing.cast(Any, v)) if isinstance(v, tuple) else v for k, v in values.items()}
    )


def _record(values: Mapping[str, Any]) -> ConfigRecord:
    """A record with a nonce.

    Flower keeps all parties' records in one store, under the hashes of their contents. Whoever
    could tell a record beforehand could ask whether it is there, or claim its hash for another list
    of parts, so that the store refuses the record itself. `pack_adapter` has a nonce too; the later
    pieces of an adapter above 5 MB, in which Flower divides it, have none.
    """
    return ConfigRecord({**values, _NONCE: secrets.token_hex(16)})


def _config(content: RecordDict, key: str) -> dict[str, Any]:
    record = content.config_records.get(key)
    if record is None:
        raise Refusal("malformed-message", f"the message has no {key!r} record")
    values = dict(typing.cast(dict[str, Any], record))
    values.pop(_NONCE, None)
    return values


def check_version(content: RecordDict) -> None:
    """Compare the server's version with this one, before anything else of a message is read.

    Raises:
        Refusal: ``version-mismatch``, also for a server that states none.
    """
    for key in (_QUERY, _ORDER, _SECURE):
        record = content.config_records.get(key)
        if record is not None and (theirs := record.get(_VERSION)) != fedlora.__version__:
            said = "an earlier fedlora" if theirs is None else f"fedlora {_quoted(theirs)}"
            raise Refusal(
                "version-mismatch",
                f"the server runs {said}, and this institution {fedlora.__version__}: install one "
                "version on both sides",
            )


def _versioned(values: Mapping[str, Any]) -> ConfigRecord:
    return _record({**values, _VERSION: fedlora.__version__})


def _asked(content: RecordDict, key: str) -> dict[str, Any]:
    """The values in a message of the server, whose version `check_version` has compared."""
    values = _config(content, key)
    values.pop(_VERSION, None)
    return values


def pack_query(query: Query) -> RecordDict:
    """A `Query` as records."""
    return RecordDict({_QUERY: _versioned(_plain(query))})


def unpack_query(content: RecordDict) -> Query:
    """The `Query` in a message. Raises `Refusal` when it is not one."""
    _holds_only(content, _QUERY)
    query = _build(Query, _asked(content, _QUERY))
    _check_run(query.run)
    return query


def pack_hello(hello: Hello) -> RecordDict:
    """A `Hello` as the reply to a query."""
    return RecordDict({_HELLO: _plain(hello)})


def unpack_hello(content: RecordDict) -> Hello:
    """The `Hello` in a reply. Raises `Refusal` when it is not one, or the institution refused."""
    _raise_refusal(content)
    _holds_only(content, _HELLO)
    return _build(Hello, _config(content, _HELLO))


def pack_secure(message: SecureMessage) -> RecordDict:
    """A message of secure aggregation as records."""
    return RecordDict({_SECURE: _versioned({_SECURE: message.to_bytes()})})


def unpack_secure(kind: type[_Secure], content: RecordDict) -> _Secure:
    """The message of secure aggregation in a message. Raises `Refusal` when it is no ``kind``."""
    _raise_refusal(content)
    _holds_only(content, _SECURE)
    return _secure(kind, content)


def _secure(kind: type[_Secure], content: RecordDict) -> _Secure:
    values = _asked(content, _SECURE)
    encoded = values.get(_SECURE)
    if len(values) != 1 or not isinstance(encoded, bytes):
        raise Refusal("malformed-message", f"the message holds no bytes of a {kind.__name__}")
    return kind.from_bytes(encoded)


def with_masked_order(content: RecordDict, order: MaskedOrder) -> RecordDict:
    """A packed `TrainOrder` that begins a round of secure aggregation; they share the adapter."""
    return RecordDict({**content, **pack_secure(order)})


def pack_order(order: "TrainOrder | EvaluateOrder | Release", adapter: ArrayRecord) -> RecordDict:
    """An order and its adapter as records; engines share the adapter's record between orders."""
    values = _plain(order, "adapter", "masked", "origins")
    if isinstance(order, Release):
        values["origins"] = json.dumps(list(order.origins))
    return RecordDict({_ORDER: _versioned(values), _ADAPTER: adapter})


def unpack_order(content: RecordDict) -> TrainOrder:
    """The `TrainOrder` in a message. Raises `Refusal` when it is not one."""
    _holds_only(content, _ORDER, _ADAPTER, _SECURE)
    values = _asked(content, _ORDER) | {"adapter": _adapter(content)}
    values["masked"] = _secure(MaskedOrder, content) if _SECURE in content else None
    return _identified(_build(TrainOrder, values))


class OrderReader:
    """Unpacks the orders of one call; equal messages give one `TrainOrder`, parsed once."""

    def __init__(self) -> None:
        self._read: list[tuple[RecordDict, TrainOrder]] = []

    def unpack(self, content: RecordDict) -> TrainOrder:
        """The `TrainOrder` in a message. Raises `Refusal` when it is not one."""
        for other, order in self._read:
            if other == content:
                return order
        order = unpack_order(content)
        self._read.append((content, order))
        return order


def unpack_evaluate(content: RecordDict) -> EvaluateOrder:
    """The `EvaluateOrder` in a message. Raises `Refusal` when it is not one."""
    _holds_only(content, _ORDER, _ADAPTER)
    values = _asked(content, _ORDER)
    return _identified(_build(EvaluateOrder, values | {"adapter": _adapter(content)}))


def unpack_release(content: RecordDict) -> Release:
    """The `Release` in a message. Raises `Refusal` when it is not one."""
    _holds_only(content, _ORDER, _ADAPTER)
    values = _asked(content, _ORDER)
    values |= {"adapter": _adapter(content), "origins": _origins(values.get("origins"))}
    release = _identified(_build(Release, values))
    if not RUN_NAME.fullmatch(release.name):
        raise Refusal("malformed-message", f"{_quoted(release.name)} is no name of a run")
    return release


def _origins(text: Any) -> list[Origin]:
    """The origins of a release. Raises `Refusal` if they are none."""
    if isinstance(text, str) and len(text) <= MAX_ORIGINS_CHARACTERS:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            return origins_of(json.loads(text))
    raise Refusal(
        "malformed-message",
        f"the origins are no JSON list of runs of up to {MAX_ORIGINS_CHARACTERS} characters",
    )


def pack_evaluation(evaluation: Evaluation) -> RecordDict:
    """An `Evaluation` as a reply."""
    values = {"institution": evaluation.institution, "metrics": json.dumps(evaluation.metrics)}
    return RecordDict({_EVALUATION: _record(values)})


def unpack_evaluation(content: RecordDict, rows: int = 0) -> Evaluation:
    """The `Evaluation` in a reply.

    Args:
        content: The reply.
        rows: Rows of which it may have the predictions of three models.

    Raises:
        Refusal: If it is none.
    """
    _raise_refusal(content)
    _holds_only(content, _EVALUATION)
    values = _config(content, _EVALUATION)
    text, metrics = values.get("metrics"), None
    most = MAX_EVALUATION_CHARACTERS + CHARACTERS_OF_A_ROW * rows
    if isinstance(text, str) and len(text) <= most:
        with contextlib.suppress(ValueError, RecursionError):
            metrics = json.loads(text)
    if not isinstance(metrics, dict):
        raise Refusal(
            "malformed-message", f"the metrics are no JSON object of up to {most} characters"
        )
    return _build(Evaluation, values | {"metrics": metrics})


def pack_update(update: ClientUpdate) -> RecordDict:
    """A `ClientUpdate` as records."""
    content = RecordDict(
        {
            _UPDATE: _plain(update, "adapter", "privacy", "metrics", "words"),
        }
    )
    if update.metrics:
        content[_METRICS] = MetricRecord(dict(update.metrics))
    if update.words is None:
        content[_ADAPTER] = pack_adapter(update.adapter)
    else:
        content[_WORDS] = _pack_words(update.words)
    if update.privacy is not None:
        content[_PRIVACY] = _plain(update.privacy)
    return content


def unpack_update(content: RecordDict) -> ClientUpdate:
    """The `ClientUpdate` in a reply.

    Raises:
        Refusal: With the institution's own code when it refused, or ``malformed-message``.
    """
    _raise_refusal(content)
    _holds_only(content, _UPDATE, _ADAPTER, _WORDS, _METRICS, _PRIVACY)
    values: dict[str, Any] = _config(content, _UPDATE)
    if _WORDS in content:
        _holds_only(content, _UPDATE, _WORDS, _METRICS, _PRIVACY)
        values |= {"words": _words(content), "adapter": _no_adapter()}
    else:
        values |= {"words": None, "adapter": _adapter(content)}
    privacy = None
    if _PRIVACY in content.config_records:
        privacy = _build(PrivacySpent, _config(content, _PRIVACY))
    metrics = dict(content.metric_records.get(_METRICS, MetricRecord()))
    for name, value in metrics.items():
        if len(name) > MAX_TEXT_CHARACTERS or not isinstance(value, int | float):
            raise Refusal("malformed-message", f"the figure {_quoted(name)} is no number")
    return _build(ClientUpdate, values | {"privacy": privacy, "metrics": metrics})


def pack_refusal(code: str) -> RecordDict:
    """A refusal: its code and nothing else."""
    return RecordDict({_REFUSED: _record({"code": code})})


def _raise_refusal(content: RecordDict) -> None:
    if _REFUSED in content.config_records:
        code = str(content.config_records[_REFUSED].get("code", ""))
        raise Refusal(code if _CODE.fullmatch(code) else "refused", "the institution refused")


def adapter_bytes(content: RecordDict) -> int:
    """Bytes of the adapter, or of the words in its place, as Flower counts them."""
    return sum(array_bytes(record) for record in content.array_records.values())


def drop_arrays(content: RecordDict) -> None:
    """Take the arrays out of a message that has been read.

    Flower's records are cycles: without this, an array stays until the next garbage collection.
    """
    for record in content.array_records.values():
        record.clear()


def array_bytes(record: ArrayRecord) -> int:
    """Bytes of arrays, as Flower counts them."""
    return sum(len(array.data) for array in record.values())


def share_key(message: Message) -> str | None:
    """The key of the record that many messages of a round share, or None."""
    return _ADAPTER if message.has_content() and _ADAPTER in message.content.array_records else None


def _adapter(content: RecordDict) -> "AdapterState":
    record = content.array_records.get(_ADAPTER)
    if record is None:
        raise Refusal("malformed-message", "the message has no adapter")
    try:
        return _state(_only(record))
    except Exception as error:  # a stranger's bytes can raise anything
        said = f"{type(error).__name__}: {error}"[:200]
        raise Refusal("malformed-message", f"the adapter cannot be read: {said}") from None


def _only(record: ArrayRecord) -> bytes:
    """The data of the record's one array; a record with anything else is refused."""
    ((name, array),) = record.items()
    data = array.data
    if (name, array.stype, array.dtype) != (_ADAPTER, _SAFETENSORS, "uint8"):
        raise ValueError("it is no array that holds a safetensors file")
    if tuple(array.shape) != (len(data),):
        raise ValueError(f"its shape is {tuple(array.shape)} for {len(data)} bytes")
    if (size := int.from_bytes(data[:8], "little")) > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size} bytes, above {MAX_HEADER_BYTES}")
    return data


def _no_adapter() -> "AdapterState":
    from fedlora.models.adapters import AdapterState

    return AdapterState({})


def _pack_words(words: Int64) -> ArrayRecord:
    return ArrayRecord({_WORDS: Array(_INT64, words.shape, _RAW, words.astype(_INT64).tobytes())})


def _words(content: RecordDict) -> Int64:
    record = content.array_records.get(_WORDS)
    found = [] if record is None else list(record.items())
    if len(found) == 1:
        name, array = found[0]
        about = (name, array.stype, array.dtype, tuple(array.shape))
        if about == (_WORDS, _RAW, _INT64, (len(array.data) // 8,)) and len(array.data) % 8 == 0:
            return np.frombuffer(array.data, _INT64).astype(np.int64, copy=False)
    raise Refusal("malformed-message", "the words are not one vector of 64-bit integers")


def _identified(order: _Order) -> _Order:
    """The order, if its run and round are safe in a file's name."""
    _check_run(order.run)
    if order.round < 0:
        raise Refusal("malformed-message", f"round {order.round} is no round")
    return order


def _check_run(run: str) -> None:
    if not re.fullmatch("[0-9A-Za-z]{1,64}", run):
        raise Refusal("malformed-message", f"run {_quoted(run)} is no identity of a run")


def _holds_only(content: RecordDict, *names: str) -> None:
    """Refuse a message with records that nobody reads."""
    if extra := sorted(set(content) - set(names)):
        raise Refusal("malformed-message", f"the message has a record {_quoted(extra[0])}")


def _build(cls: type[_T], values: dict[str, Any]) -> _T:
    """The message from its fields; each must have its declared plain type."""
    made = dict(values)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        kind = typing.cast(Any, field.type)
        if kind in _PLAIN:
            made[field.name] = value = _as(kind, values.get(field.name))
            if value is None:
                raise Refusal(
                    "malformed-message",
                    f"{cls.__name__}.{field.name} is {_quoted(values.get(field.name))}, not "
                    f"{_PLAIN[kind]}",
                )
    try:
        return cls(**made)
    except TypeError as error:
        raise Refusal("malformed-message", str(error)[:200]) from None


def _as(kind: Any, value: Any) -> Any:
    """The value as this type; None if it has another type or is too large."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return None
    if kind is int and isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) and len(value) <= MAX_TEXT_CHARACTERS else None
    if kind == tuple[str, ...]:
        items = typing.cast(list[Any], value if isinstance(value, list | tuple) else [None])
        fine = len(items) <= MAX_LIST_TEXTS and all(_as(str, item) is not None for item in items)
        return tuple(items) if fine else None
    return value if isinstance(value, kind) else None


def _quoted(value: Any) -> str:
    """A stranger's value for a log, escaped and cut to 80 characters."""
    return repr(value)[:80]


def update_to_bytes(update: ClientUpdate) -> bytes:
    """An update as the bytes of a safetensors file, for the institution's store of answers."""
    fields = {
        "institution": update.institution,
        "round": update.round,
        "run": update.run,
        "size": update.size,
        "privacy": None if update.privacy is None else dataclasses.asdict(update.privacy),
        "metrics": dict(update.metrics),
    }
    held: Mapping[str, Any] = update.adapter
    if update.words is not None:
        import torch

        held = {_WORDS: torch.as_tensor(update.words)}
    return _blob(held, {_UPDATE: json.dumps(fields)})


def update_from_bytes(blob: bytes) -> ClientUpdate:
    """The update that `update_to_bytes` wrote, equal to the last bit."""
    size = int.from_bytes(blob[:8], "little")
    fields = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"][_UPDATE])
    if fields["privacy"] is not None:
        fields["privacy"] = PrivacySpent(**fields["privacy"])
    import safetensors.torch

    tensors = safetensors.torch.load(blob)
    if list(tensors) == [_WORDS]:
        return ClientUpdate(adapter=_no_adapter(), words=tensors[_WORDS].numpy(), **fields)
    return ClientUpdate(adapter=_state(blob), **fields)

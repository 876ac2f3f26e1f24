import dataclasses
import json
import math
import mmap

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord

from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.wire import wire
from fedlora.wire.messages import (
    ClientUpdate,
    EvaluateOrder,
    Evaluation,
    Hello,
    Query,
    Release,
)
from tests.samples import privacy_spent, train_order

STATE = AdapterState({"x.lora_A.weight": torch.randn(2, 3), "x.lora_B.weight": torch.randn(4, 2)})
ORDER = train_order(run="r", round=2, base="b", report=("loss",), parts=("A", "B"), adapter=STATE)
SPENT = privacy_spent(epsilon=1 / 3, noise_multiplier=math.pi, steps=3, ledger_epsilon=0.1 + 0.2)
UPDATE = ClientUpdate(
    institution="bank",
    round=2,
    run="a",
    adapter=STATE,
    size=128.0,
    privacy=SPENT,
    metrics={"loss": 0.5},
)


def _file(padding=0, **tensor):
    """A safetensors file of one tensor that is described so, without a value."""
    header = json.dumps({"x.lora_A.weight": tensor}).encode()
    header += b" " * (-len(header) % 8 + padding)
    return len(header).to_bytes(8, "little") + header


def _same(a, b):
    assert {k: v for k, v in vars(a).items() if k != "adapter"} == {
        k: v for k, v in vars(b).items() if k != "adapter"
    }
    assert all(torch.equal(a.adapter[k], b.adapter[k]) for k in a.adapter)


def test_packages_come_back_to_the_last_bit():
    _same(wire.unpack_order(wire.pack_order(ORDER, wire.pack_adapter(STATE))), ORDER)
    _same(wire.unpack_update(wire.pack_update(UPDATE)), UPDATE)
    _same(wire.update_from_bytes(wire.update_to_bytes(UPDATE)), UPDATE)
    plain = dataclasses.replace(UPDATE, privacy=None, metrics={})
    _same(wire.unpack_update(wire.pack_update(plain)), plain)
    _same(wire.update_from_bytes(wire.update_to_bytes(plain)), plain)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.pop("update"),
        lambda c: c.pop("adapter"),
        lambda c: c["update"].pop("institution"),
        lambda c: c["update"].update({"round": "two"}),
        lambda c: c["update"].update({"extra": 1}),
        lambda c: c["privacy"].update({"epsilon": "none"}),
    ],
)
def test_a_malformed_update_is_refused(spoil):
    content = wire.pack_update(UPDATE)
    spoil(content)
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_update(content)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + bytes(60),
        wire.pack_adapter(STATE)["adapter"].data[:-4],
        _file(dtype="F32", shape=[10**15], data_offsets=[0, 4 * 10**15]),
        _file(dtype="F32", shape=[10**23], data_offsets=[0, 4 * 10**23]),
        safetensors.torch.save({"x.lora_A.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}),
        wire.pack_adapter(STATE)["adapter"].data + bytes(4),
        _file(dtype="F32", shape=[], data_offsets=[4, 8]) + bytes(8),
        _file(dtype="F32", shape=[1], data_offsets=[0, 8]) + bytes(8),
        _file(dtype="F32", shape=[-1, -1], data_offsets=[0, 4]) + bytes(4),
        _file(dtype="F32", shape=[True], data_offsets=[0, 4]) + bytes(4),
        _file(dtype="F32", shape=[1] * 9, data_offsets=[0, 4]) + bytes(4),
        _file(dtype="F32", shape=[1], data_offsets=[0, 4], padding=1) + bytes(4),
    ],
    ids=[
        "empty",
        "archive",
        "cut",
        "beyond-memory",
        "beyond-addresses",
        "bf16",
        "more",
        "a-hole",
        "too-large",
        "negative",
        "truth-values",
        "nine-dimensions",
        "odd-header",
    ],
)
def test_an_adapter_that_cannot_be_read_is_refused(data):
    content = wire.pack_update(UPDATE)
    array = content["adapter"]["adapter"]
    content["adapter"]["adapter"] = dataclasses.replace(array, data=data, shape=(len(data),))
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_update(content)


def test_an_adapter_in_a_file_is_read_without_a_copy(tmp_path):
    content = wire.pack_update(UPDATE)
    array = content["adapter"]["adapter"]
    (file := tmp_path / "array").write_bytes(array.data)
    with file.open("rb") as opened:
        array.data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    update = wire.unpack_update(content)
    _same(update, UPDATE)
    first = min(update.adapter.values(), key=lambda tensor: tensor.data_ptr())
    begin = torch.frombuffer(array.data, dtype=torch.uint8).data_ptr()
    assert 0 < first.data_ptr() - begin < 500  # after the header


WORDS = dataclasses.replace(
    UPDATE, adapter=AdapterState({}), words=np.array([0, 1, -1, 2**63 - 1, -(2**63)]), metrics={}
)


def test_words_come_back_and_take_eight_bytes_each():
    packed = wire.pack_update(WORDS)
    assert wire.adapter_bytes(packed) == 5 * 8
    for again in (wire.unpack_update(packed), wire.update_from_bytes(wire.update_to_bytes(WORDS))):
        assert again.words is not None and again.words.dtype == np.int64
        assert again.words.tolist() == WORDS.words.tolist() and not again.adapter
        assert dataclasses.replace(again, words=None) == dataclasses.replace(WORDS, words=None)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda array: {"words": array, "another": array},
        lambda array: {"another": array},
        lambda _: {},
        lambda array: {"words": dataclasses.replace(array, dtype="<u8")},
        lambda array: {"words": dataclasses.replace(array, stype="numpy.ndarray")},
        lambda array: {"words": dataclasses.replace(array, shape=(4,))},
        lambda array: {"words": dataclasses.replace(array, shape=(5, 1))},
        lambda array: {"words": dataclasses.replace(array, data=array.data[:-3])},
    ],
    ids=["more", "other", "none", "dtype", "stype", "shape", "matrix", "cut"],
)
def test_a_record_is_one_vector_of_words_and_nothing_else(spoil):
    content = wire.pack_update(WORDS)
    content["words"] = ArrayRecord(spoil(content["words"]["words"]))
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_update(content)


def test_an_update_with_words_and_an_adapter_is_refused():
    content = wire.pack_update(WORDS)
    content["adapter"] = wire.pack_adapter(STATE)
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_update(content)


def _many_nothings():
    """A safetensors file that names many tensors of no size."""
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": nothing for i in range(20_000)}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays, array: {**arrays, "another": array},
        lambda _, array: {"another": array},
        lambda arrays, _: {},
        lambda _, array: {"adapter": dataclasses.replace(array, stype="numpy.ndarray")},
        lambda _, array: {"adapter": dataclasses.replace(array, dtype="float32")},
        lambda _, array: {"adapter": dataclasses.replace(array, shape=(1,))},
        lambda *_: {
            "adapter": Array("uint8", (len(_many_nothings()),), "safetensors", _many_nothings())
        },
    ],
    ids=["more", "other", "none", "stype", "dtype", "shape", "header"],
)
def test_a_record_is_an_adapter_and_nothing_else(spoil):
    content = wire.pack_update(UPDATE)
    arrays = dict(content["adapter"])
    content["adapter"] = ArrayRecord(spoil(arrays, arrays["adapter"]))
    with pytest.raises(Refusal, match="malformed-message") as refused:
        wire.unpack_update(content)
    assert len(str(refused.value)) < 300


def test_a_refusal_carries_its_code_and_nothing_else():
    content = wire.pack_refusal("budget-exhausted")
    assert list(content) == ["refused"]
    assert {**content["refused"], "nonce": ""} == {"code": "budget-exhausted", "nonce": ""}
    with pytest.raises(Refusal) as caught:
        wire.unpack_update(content)
    assert caught.value.code == "budget-exhausted"


def test_nobody_can_tell_a_record_beforehand():
    update = dataclasses.replace(UPDATE, privacy=None, metrics={})

    def made():
        messages = (
            wire.pack_query(Query(run="a1", first=True, participations=1)),
            wire.pack_refusal("guard"),
            wire.pack_update(update),
        )
        return [record for message in messages for record in message.config_records.values()]

    assert not wire.pack_update(update).metric_records  # an empty one is the same for all
    assert all(one != other for one, other in zip(made(), made(), strict=True))
    adapters = [wire.pack_adapter(STATE)["adapter"].data for _ in range(2)]
    assert adapters[0] != adapters[1]


def test_a_release_comes_back_and_its_name_is_a_run_s():
    behind = [{"run": f"{n:032x}", "source": "institutions", "private": True} for n in range(50)]
    release = Release(
        run="a1", name="first.2-b", round=4, base="0" * 64, origins=behind, adapter=STATE
    )
    arrays = wire.pack_adapter(STATE)
    _same(wire.unpack_release(wire.pack_order(release, arrays)), release)
    for changes in ({"name": "../x"}, {"name": ""}, {"name": "x" * 64}, {"run": "a/b"}):
        content = wire.pack_order(dataclasses.replace(release, **changes), arrays)
        with pytest.raises(Refusal, match="malformed-message"):
            wire.unpack_release(content)
    content = wire.pack_order(release, arrays)
    (asked,) = content.config_records.values()
    for origins in ("x", "{}", '["a"]', '[{"run": "a"}]', 3, " " * 2**18 + "[]", None):
        if origins is None:
            del asked["origins"]
        else:
            asked["origins"] = origins
        with pytest.raises(Refusal, match="the origins are no JSON list of runs"):
            wire.unpack_release(content)


def test_what_an_evaluation_asks_and_answers_comes_back():
    order = EvaluateOrder(run="a1", round=4, save=True, adapter=STATE)
    _same(wire.unpack_evaluate(wire.pack_order(order, wire.pack_adapter(STATE))), order)
    answer = Evaluation(institution="bank", metrics={"accuracy": 0.1 + 0.2, "n": 3})
    assert wire.unpack_evaluation(wire.pack_evaluation(answer)) == answer
    hello = Hello(institution="bank", version="1", fits=True)
    assert wire.unpack_hello(wire.pack_hello(hello)) == hello


def test_predictions_of_many_rows_fit_into_an_evaluation_and_no_more_than_they_need():
    rows = 200_000
    metrics = {model: [77] * rows for model in ("alone", "shared", "own")}
    packed = wire.pack_evaluation(Evaluation(institution="Alpha", metrics=metrics))
    assert wire.unpack_evaluation(packed, rows).metrics == metrics
    with pytest.raises(Refusal, match="no JSON object of up to 1048576 characters"):
        wire.unpack_evaluation(packed)


@pytest.mark.parametrize("run", ["../../evil", "*", "a-1", "", "a" * 65, "a\n"])
def test_a_run_that_could_name_another_file_is_refused(run):
    for order in (
        wire.pack_order(dataclasses.replace(ORDER, run=run), wire.pack_adapter(STATE)),
        wire.pack_order(dataclasses.replace(ORDER, round=-1), wire.pack_adapter(STATE)),
    ):
        with pytest.raises(Refusal, match="malformed-message"):
            wire.unpack_order(order)
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_query(wire.pack_query(Query(run=run, first=True, participations=1)))
    order = EvaluateOrder(run=run, round=1, save=False, adapter=STATE)
    with pytest.raises(Refusal, match="malformed-message"):
        wire.unpack_evaluate(wire.pack_order(order, wire.pack_adapter(STATE)))

"""Plug-ins by name and by object, and the sources and partitions that they give."""

import hashlib
import importlib
import sys

import numpy as np
import pytest

from fedlora.config import plugins
from fedlora.config.config import from_flat
from fedlora.data import rows, sources
from fedlora.errors import InputError, RecordError

MODULE = """
import functools
from strategies import fedavg
from strategies.base import Strategy
calls = []
number = 7
def share_of(label, predictions):
    return predictions.count(label) / len(predictions)
def keep(share, this_round, updates):
    return share
class Above:
    def __init__(self, bound):
        self.bound = bound
    def __call__(self, predictions):
        return self.bound
def keep_all(this_round, updates):
    return 1.0
share_of_x = functools.partial(share_of, "x")
share_of_y = functools.partial(share_of, "y")
half = Strategy(aggregate=functools.partial(keep, 0.5))
whole = Strategy(aggregate=keep_all)
above_two = Above(2)
mean = Strategy(aggregate=fedavg.aggregate)
def by_length(texts, labels, seed):
    return ["long" if len(text) > 3 else "short" for text in texts]
def too_few(texts, labels, seed):
    return ["one"]
def table():
    calls.append(1)
    return {"text": ["ab", "abcd", "abcde", "abc"], "label": ["x", "y", "x", "y"]}
def broken():
    raise KeyError("secret record")
class Deep:
    @staticmethod
    def metric(predictions):
        return 1.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "own_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path / "own_code.py"
    sys.modules.pop("own_code", None)
    sources.forget()
    plugins.forget()


def test_a_name_is_imported_from_the_working_directory_and_described_with_the_hash_of_its_file(own):
    found = plugins.load("tracking.callbacks", "own_code:Deep.metric")
    assert found(None) == 1.0
    assert plugins.describe([("tracking.callbacks", "own_code:Deep.metric")]) == [
        {
            "key": "tracking.callbacks",
            "object": "own_code:Deep.metric",
            "sha256": hashlib.sha256(own.read_bytes()).hexdigest(),
        }
    ]


def test_the_hash_is_of_the_code_that_this_process_runs(own):
    named = [("tracking.callbacks", "own_code:Deep.metric")]
    before = hashlib.sha256(own.read_bytes()).hexdigest()
    plugins.load(*named[0])
    own.write_text(MODULE.replace("return 1.0", "return 2.0"))
    plugins.forget()
    assert plugins.describe(named)[0]["sha256"] == before
    sys.modules.pop("own_code")
    importlib.invalidate_caches()
    assert plugins.load(*named[0])(None) == 2.0
    assert plugins.describe(named)[0]["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("tracking.callbacks", "no_such_module:x", "no_such_module cannot be imported"),
        ("tracking.callbacks", "own_code:Deep.metrik", "has no Deep.metrik"),
        ("tracking.callbacks", "own_code:number", "is a int and cannot be called"),
        ("federation.strategy", "own_code:table", "2 arguments (this_round, updates)"),
        ("data.source", "own_code:by_length", "0 arguments (nothing)"),
    ],
)
def test_a_name_that_names_no_plug_in_is_refused_in_words(own, key, name, words):
    with pytest.raises(InputError) as error:
        plugins.load(key, name)
    assert name in str(error.value) and words in str(error.value)


def test_an_object_is_found_in_this_process_under_its_own_name():
    def local(predictions):
        return 2.0

    try:
        name = plugins.give("tracking.callbacks", local)
        assert name.endswith("<locals>.local")
        assert plugins.load("tracking.callbacks", name) is local
        with pytest.raises(InputError, match="is 3; give a function"):
            plugins.give("tracking.callbacks", 3)
        plugins.give("tracking.callbacks", lambda record: None)
        with pytest.raises(InputError, match="rename one of them"):
            plugins.give("tracking.callbacks", lambda record: None)
    finally:
        plugins.forget()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"federation.strategy": "median"}, "must be module:object"),
        ({"data.source": "python:median"}, "must be module:object"),
        ({"federation.strategy": "a:b", "federation.robust": "krum"}, "federation.robust"),
        (
            {
                "federation.strategy": "a:b",
                "federation.weighting": "uniform",
                "privacy.institution-epsilon": 1.0,
            },
            "privacy.institution-epsilon",
        ),
    ],
)
def test_a_plug_in_that_would_not_be_called_is_refused(values, words):
    with pytest.raises(InputError) as error:
        from_flat(values)
    assert words in str(error.value)


def settings(**values):
    keys = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    given = {
        "data.source": "python:own_code:table",
        "data.test-fraction": 0.0,
        "data.min-records": 1,
        **keys,
    }
    return from_flat({"privacy.epsilon": "inf", **given}).data


def test_a_function_is_a_source_and_is_called_once(own):
    wanted = {"text": "data.text", "label": "data.label"}
    assert sources.read("python:own_code:table", wanted)["text"] == ["ab", "abcd", "abcde", "abc"]
    assert len(sys.modules["own_code"].calls) == 1
    with pytest.raises(RecordError, match="failed with KeyError"):  # for no log: it quotes a record
        sources.read("python:own_code:broken", wanted)


def test_a_function_is_a_partition(own):
    made = rows.partition_rows(
        settings(partition="python:own_code:by_length"), unit="record", seed=1, task="x"
    )
    assert made.names == ("long", "short")
    assert made.train[0].texts == ["abcd", "abcde", "ab", "abc"]
    numbers = np.array([3, 1, 3, 3])
    name = plugins.give("data.partition", lambda texts, labels, seed: numbers)
    made = rows.partition_rows(
        settings(partition=f"python:{name}"), unit="record", seed=1, task="x"
    )
    assert made.names == ("1", "3")
    with pytest.raises(InputError, match="gave 1 institutions for 4 rows"):
        rows.partition_rows(
            settings(partition="python:own_code:too_few"), unit="record", seed=1, task="x"
        )

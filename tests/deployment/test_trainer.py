"""The process that keeps an institution's base: what an app does to it costs one message."""

import gc
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from deployment import trainer
from fedlora.config.sections import ModelConfig
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.files import write_atomic
from fedlora.models import trainable
from fedlora.wire import wire

SECRET = "Jane Doe, account 4711"


@pytest.fixture(autouse=True)
def task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower gives a message the process's task
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def context(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "r.csv").write_text("text,label\n")
    values = {"name": "a", "ledger": "l.db", "state": "s", "source": "r.csv"}
    models = [str(tmp_path / "model"), "another"]
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    file = tmp_path / "institution.toml"
    file.write_text("\n".join([*lines, f"models = {models!r}", "max-seconds = 60"]))
    file.chmod(0o600)
    config = {"model.name": str(tmp_path / "model")}
    return Context(1, 1, {"settings": str(file)}, RecordDict(), config)


def _message(how=""):
    return Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1, "train", group_id=how)


def _code(reply):
    with pytest.raises(Refusal) as refusal:
        wire.unpack_update(reply.content)
    return refusal.value.code


@pytest.fixture
def with_app(monkeypatch):
    """Makes a trainer in this process with another app."""

    def make(app):
        monkeypatch.setattr(trainer, "installed_app", lambda: app)
        return trainer.Trainer()

    return make


def test_what_an_app_raises_leaves_as_a_code_and_is_logged_by_its_place(with_app, context, caplog):
    def raises(*_):
        raise KeyError(SECRET)

    reply = with_app(raises).answer(_message(), context)
    assert _code(reply) == "failed"
    assert SECRET not in caplog.text
    assert "KeyError at" in caplog.text
    assert "raises" in caplog.text


def test_settings_that_replace_the_old_ones_are_in_force_for_the_next_message(context):
    context.run_config.update({"data.source": "institutions", "data.labels": '["x", "y"]'})
    context.run_config.update({"data.institutions": 1, "privacy.epsilon": float("inf")})
    file = Path(context.node_config["settings"])
    file.write_text(file.read_text() + '\nlabels = ["x", "y"]\nwithout-dp = true')
    made = trainer.Trainer()
    assert _code(made.answer(_message(), context)) == "malformed-message"
    tightened = file.read_text().replace("without-dp = true", "without-dp = false")
    write_atomic(file, tightened.encode())
    assert _code(made.answer(_message(), context)) == "dp-required"


def test_what_is_in_memory_is_let_go_when_its_files_or_the_model_change(
    with_app, context, monkeypatch
):
    forgotten = []
    monkeypatch.setattr(gc, "collect", lambda: None)
    monkeypatch.setattr(trainable, "forget", lambda: forgotten.append("base"))
    monkeypatch.setattr(records, "forget", lambda: forgotten.append("records"))
    made = with_app(lambda m, c: Message(RecordDict(), reply_to=m))

    def forgets():
        forgotten.clear()
        made.answer(_message(), context)
        assert forgotten in ([], ["records"], ["base", "records"])
        return len(forgotten)

    model = Path(context.run_config["model.name"])
    assert not forgets() and not forgets()  # nothing is in memory yet, then it is what it was
    (model / "model.safetensors").write_bytes(b"other weights")
    assert forgets() == 2 and not forgets()
    (model.parent / "r.csv").write_text("text,label\na,b\n")
    assert forgets() == 1 and not forgets()  # the base stays
    context.run_config["model.name"] = "not allowed"
    assert not forgets()
    context.run_config["model.name"] = "another"  # allowed, and not there
    assert forgets() == 2
    context.run_config["model.name"] = str(model)
    assert forgets() == 2 and not forgets()  # the state in between is unknown
    monkeypatch.setattr(ModelConfig, "name", str(model))  # what a server that names none asks for
    del context.run_config["model.name"]
    (model / "model.safetensors").write_bytes(b"yet other weights")
    assert forgets() == 2 and not forgets()

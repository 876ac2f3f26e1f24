"""A message goes to the institution's own installed app, and what is wrong leaves as a code."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.task_identity import TaskIdentity

from client import app
from deployment import executor
from fedlora.errors import RecordError, Refusal
from fedlora.wire import wire
from tests.deployment import harness

SECRET = "Jane Doe, account 4711"


@pytest.fixture
def message(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower gives a message the process's task
        monkeypatch.setattr(TaskIdentity, name, 1)
    return _message()


def _message(how=""):
    return Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1, "train", group_id=how)


@pytest.fixture
def context(tmp_path):
    values = {"name": "a", "ledger": "l.db", "state": "s", "source": "r.csv", "models": ["m"]}
    file = tmp_path / "institution.toml"
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    file.write_text("\n".join([*lines, "max-seconds = 1.5"]))
    file.chmod(0o600)
    return Context(1, 1, {"settings": str(file)}, RecordDict(), {})


def _stub(connection):
    """A trainer whose app does what the message's group says."""
    while True:
        message, _ = connection.recv()
        if message.metadata.group_id == "die":
            os._exit(3)
        if message.metadata.group_id == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        facts = ConfigRecord({"pid": os.getpid()})
        connection.send(Message(RecordDict({"facts": facts}), reply_to=message))


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(executor, "_train", _stub)
    made = executor.Trainer()
    yield made
    made.kill()


def _pid(reply):
    return reply.content["facts"]["pid"]


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_trainer_that_dies_or_hangs_costs_one_message_and_another_one_follows(
    trainer, message, context, monkeypatch, how
):
    monkeypatch.setattr(executor, "max_seconds", lambda _: 60.0)
    first = _pid(trainer.answer(_message(), context))
    assert _pid(trainer.answer(_message(), context)) == first
    monkeypatch.setattr(executor, "max_seconds", lambda _: 60.0 if how == "die" else 1.0)
    reply = trainer.answer(_message(how), context)
    if how == "die":
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    else:
        with pytest.raises(Refusal) as refusal:
            wire.unpack_update(reply.content)
        assert refusal.value.code == "timed-out"
    assert not harness.alive(first)
    monkeypatch.setattr(executor, "max_seconds", lambda _: 60.0)
    assert _pid(trainer.answer(_message(), context)) != first


class FakeSuperNode:
    """The runtime API of a SuperNode with one message, and a bundle that nobody may look at."""

    def __init__(self, monkeypatch, message, context):
        self.pushed, self.ended, self.closed = [], [], False
        monkeypatch.setattr(
            executor, "pull_task_input", lambda _: (message, context, "run", b"a bundle")
        )
        monkeypatch.setattr(executor, "push_message", lambda _, reply, c: self.pushed.append(reply))
        monkeypatch.setattr(
            executor, "push_task_output", lambda _, c, status, said: self.ended.append(status)
        )
        beat = SimpleNamespace(start=lambda: None, stop=lambda: self.ended.append("silent"))
        monkeypatch.setattr(executor, "HeartbeatSender", lambda _: beat)

    def close(self):
        self.closed = True


def test_the_answer_of_the_trainer_goes_back_and_the_app_that_was_sent_is_not_looked_at(
    message, context, monkeypatch
):
    node = FakeSuperNode(monkeypatch, message, context)
    executor.serve(node, SimpleNamespace(answer=lambda m, c: ("answered", m, c)))
    assert node.pushed == [("answered", message, context)]
    assert node.ended == [SubStatus.COMPLETED, "silent"] and node.closed


def test_a_message_that_cannot_be_answered_ends_its_heartbeat_and_quotes_nothing(
    message, context, monkeypatch, caplog
):
    node = FakeSuperNode(monkeypatch, message, context)

    def fails(*_):
        raise OSError(SECRET)

    executor.serve(node, SimpleNamespace(answer=fails))
    assert node.ended == ["silent"] and node.closed and not node.pushed
    assert SECRET not in caplog.text


def test_a_trainer_ends_with_its_executor(tmp_path):
    script = "import sys, time; from deployment import executor\n"
    script += "if __name__ == '__main__':\n  made = executor.Trainer()\n"
    script += "  print(made._process.pid, flush=True); time.sleep(600)"
    file = tmp_path / "script.py"
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(executor.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 120
        while harness.alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not harness.alive(child)


@pytest.mark.parametrize("error", [RuntimeError(SECRET), RecordError(SECRET)])
def test_an_institutions_log_quotes_no_record(message, context, monkeypatch, caplog, error):
    def situation(_):
        raise error

    monkeypatch.setattr(app, "_institution", situation)
    with caplog.at_level(logging.DEBUG):
        app.train(message, context)
    assert caplog.records
    assert SECRET not in caplog.text

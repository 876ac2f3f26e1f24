"""The process that keeps an institution's base: what an app does to it costs one message."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from client import settings
from deployment import executor, launcher, trainer
from fedlora.config.sections import ModelConfig
from fedlora.data import records
from fedlora.errors import Refusal
from fedlora.files import write_atomic
from fedlora.models import trainable
from fedlora.wire import wire
from tests.deployment import harness

SECRET = "Jane Doe, account 4711"

# A trainer whose app does what the message's group says.
STUB = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from deployment import trainer

def app(message, context):
    how = message.metadata.group_id
    if how == "die":
        os._exit(3)
    if how == "hang":
        time.sleep(3600)
    facts = ConfigRecord({"pid": os.getpid()})
    return Message(RecordDict({"facts": facts}), reply_to=message)

trainer.installed_app = lambda: app
trainer.main()
"""


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


def _hurry(context):
    file = Path(context.node_config["settings"])
    file.write_text(file.read_text().replace("max-seconds = 60", "max-seconds = 1"))


def _message(how=""):
    return Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1, "train", group_id=how)


def _code(reply):
    with pytest.raises(Refusal) as refusal:
        wire.unpack_update(reply.content)
    return refusal.value.code


def _asked(made, message, context):
    """What a trainer says to a message, and whether it goes on."""
    here, there = multiprocessing.Pipe()
    here.send(((1, 1, 1), message, context))
    goes_on = made.serve(there)
    return here.recv(), goes_on


@pytest.fixture
def with_app(monkeypatch):
    """Makes a trainer in this process with another app."""

    def make(app):
        monkeypatch.setattr(trainer, "installed_app", lambda: app)
        return trainer.Trainer()

    return make


def test_an_app_that_hangs_is_answered_for_in_time_and_the_trainer_ends(
    with_app, context, monkeypatch
):
    ends = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda s, exit: ends.append((s, exit))
    )
    _hurry(context)
    started, end = time.monotonic(), threading.Event()
    reply, goes_on = _asked(with_app(lambda m, c: end.wait(30)), _message(), context)
    assert _code(reply) == "timed-out" and not goes_on
    end.set()
    assert time.monotonic() - started < 10
    assert ends == [(1 + trainer.GRACE_SECONDS, True)]


def test_an_app_in_time_is_not_ended(with_app, context, monkeypatch):
    timers = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit: timers.append(s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", timers.clear)
    made = with_app(lambda m, c: Message(RecordDict(), reply_to=m))
    reply, goes_on = _asked(made, _message(), context)
    assert reply.has_content() and goes_on
    assert not timers


def test_what_an_app_raises_leaves_as_a_code_and_is_logged_by_its_place(with_app, context, caplog):
    def raises(*_):
        raise KeyError(SECRET)

    reply, goes_on = _asked(with_app(raises), _message(), context)
    assert _code(reply) == "failed" and goes_on
    assert SECRET not in caplog.text
    assert "KeyError at" in caplog.text
    assert "raises" in caplog.text


def test_a_package_that_is_missing_is_named(with_app, context, caplog):
    def imports(*_):
        import no_such_package  # noqa: F401

    reply, goes_on = _asked(with_app(imports), _message(), context)
    assert _code(reply) == "failed" and goes_on
    assert "(import of no_such_package)" in caplog.text


def test_settings_that_replace_the_old_ones_are_in_force_for_the_next_message(context):
    context.run_config.update({"data.source": "institutions", "data.labels": '["x", "y"]'})
    context.run_config.update({"data.institutions": 1, "privacy.epsilon": float("inf")})
    file = Path(context.node_config["settings"])
    file.write_text(file.read_text() + '\nlabels = ["x", "y"]\nwithout-dp = true')
    made = trainer.Trainer()
    assert _code(_asked(made, _message(), context)[0]) == "malformed-message"
    tightened = file.read_text().replace("without-dp = true", "without-dp = false")
    write_atomic(file, tightened.encode())
    assert _code(_asked(made, _message(), context)[0]) == "dp-required"


def test_an_answer_that_nobody_waits_for_costs_nothing(with_app, context):
    made = with_app(lambda m, c: Message(RecordDict(), reply_to=m))
    here, there = multiprocessing.Pipe()
    here.send(((1, 1, 1), _message(), context))
    here.close()
    assert made.serve(there)
    assert _asked(made, _message(), context)[1]


def test_another_users_process_gets_no_answer(with_app, context, monkeypatch, caplog):
    made = with_app(lambda m, c: pytest.fail("asked"))
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    here, there = multiprocessing.Pipe()
    here.send(((1, 1, 1), _message(), context))
    assert made.serve(there)
    there.close()
    with pytest.raises((EOFError, ConnectionError)):
        here.recv()
    assert "another user" in caplog.text


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
        _asked(made, _message(), context)
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


@pytest.mark.parametrize("kind", ["directory", "glob", "function", "held-out function"])
def test_records_of_many_files_and_of_a_function_are_let_go_too(
    kind, with_app, context, monkeypatch
):
    monkeypatch.setattr(trainable, "forget", lambda: None)
    forgotten = []
    monkeypatch.setattr(records, "forget", lambda: forgotten.append("records"))
    made = with_app(lambda m, c: Message(RecordDict(), reply_to=m))
    file = Path(context.node_config["settings"])
    parts = file.parent / "parts"
    parts.mkdir()
    (parts / "one.csv").write_text("text,label\na,b\n")
    source = {"directory": str(parts), "glob": f"{parts}/*.csv", "function": "python:bank:records"}
    if kind in source:
        file.write_text(file.read_text().replace("'r.csv'", repr(source[kind])))
    else:
        given = f"{file.read_text()}\ntest-source = 'python:bank:held_out'\n"
        file.write_text(given)

    def forgets():
        forgotten.clear()
        _asked(made, _message(), context)
        return bool(forgotten)

    assert not forgets() and not forgets()
    if kind.endswith("function"):
        context.run_id += 1  # a run reads its records once
    else:
        (parts / "one.csv").write_text("text,label\n")  # a customer has withdrawn
    assert forgets() and not forgets()


def test_files_that_cannot_be_read_are_not_taken_for_unchanged_and_stop_no_message(
    with_app, context, monkeypatch
):
    forgotten = []
    monkeypatch.setattr(trainable, "forget", lambda: forgotten.append("base"))
    monkeypatch.setattr(records, "forget", lambda: forgotten.append("records"))
    made = with_app(lambda m, c: Message(RecordDict(), reply_to=m))
    _asked(made, _message(), context)
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_files", lambda *_: Path("not-there").stat())
        for number in (1, 2):  # the app may have loaded other files in between
            reply, goes_on = _asked(made, _message(), context)
            assert goes_on and not reply.content  # the app's own answer
            assert forgotten == ["base", "records"] * number
    _asked(made, _message(), context)
    assert forgotten == ["base", "records"] * 3
    _asked(made, _message(), context)
    assert len(forgotten) == 6  # unchanged


def test_settings_without_a_limit_have_one(context):
    context.node_config["settings"] = "nowhere"
    assert trainer.max_seconds(context) == settings.Settings.max_seconds == 1800


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A launcher's trainer with the stub app, and its socket."""
    real = subprocess.Popen

    def stub(command, **options):
        return real([sys.executable, "-c", STUB, *command[-2:]], **options)

    monkeypatch.setattr(subprocess, "Popen", stub)
    made = object.__new__(launcher.InstalledAppExecutor)
    made._path = tmp_path / "socket"
    made._trainer = made._start()
    yield made
    made._trainer.kill()
    made._trainer.wait()


def test_one_process_answers_message_after_message(running, context):
    pids = set()
    for _ in range(3):
        facts = executor.answer(running._path, _message(), context).content["facts"]
        pids.add(facts["pid"])
    assert pids == {running._trainer.pid}


def test_what_a_messages_process_imports_has_no_torch():
    modules = ", ".join(launcher.IMPORTED)
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_trainer_that_dies_or_hangs_fails_its_message_and_another_one_follows(
    running, context, how
):
    if how == "hang":
        _hurry(context)
    reply = executor.answer(running._path, _message(how), context)
    if how == "die":
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    else:
        assert _code(reply) == "timed-out"
    ended = running._trainer
    assert ended.wait(10) == (3 if how == "die" else 1)
    running.reconcile()
    facts = executor.answer(running._path, _message(), context).content["facts"]
    assert facts["pid"] == running._trainer.pid != ended.pid


def test_nobody_but_its_owner_may_use_the_socket(running, context, monkeypatch):
    executor.answer(running._path, _message(), context)
    assert running._path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # as if the socket were another user's
    reply = executor.answer(running._path, _message(), context)
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED


def test_a_trainer_ends_with_its_launcher(tmp_path):
    script = "import os, subprocess, sys, time\n"
    script += "made = subprocess.Popen([*sys.argv[1:], str(os.getpid())])\n"
    script += "print(made.pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, sys.executable, "-c", STUB, str(tmp_path / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not (tmp_path / "socket").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        while harness.alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not harness.alive(child)

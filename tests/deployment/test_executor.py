"""A message goes to the institution's own installed app, and what is wrong leaves as a code."""

import functools
import logging
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from client import app
from deployment import executor, launcher
from fedlora import flower_internals
from fedlora.errors import InputError, RecordError, place

SECRET = "Jane Doe, account 4711"


@pytest.fixture
def message(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):  # Flower gives a message the process's task
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Message(RecordDict({"x": ConfigRecord({"y": 1})}), 1, "train")


@pytest.fixture
def context():
    return Context(1, 1, {}, RecordDict(), {})


@pytest.fixture
def replaced(monkeypatch):
    """Flower's own functions are put back after the test."""
    for name in ("install_from_fab", "get_project_dir", "get_load_client_app_fn"):
        assert callable(getattr(run_clientapp, name)), f"flwr has no {name} any more"
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))
    trainer = functools.partial(executor.answer, Path("/private/trainer"))
    flower_internals.use_installed_client_app(trainer)


class Trainer:
    """The connection to one."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def send(self, asked):
        assert isinstance(asked[1], Message)

    def recv(self):
        return "the trainer's answer"


def test_an_app_that_was_sent_is_neither_installed_nor_run(
    replaced, message, context, monkeypatch, tmp_path
):
    """The steps of Flower's `run_clientapp`, with a bundle whose code would leave a mark."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    mark = tmp_path / "mark"
    bundle = f"open({str(mark)!r}, 'w')".encode()
    run_clientapp.install_from_fab(bundle, skip_prompt=True)
    run_clientapp.get_project_dir("evil/app", "1", "0" * 64)
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    asked = []
    monkeypatch.setattr(executor, "_connected", lambda path: asked.append(path) or Trainer())
    answer = load("evil/app", "1", "0" * 64)
    assert answer(message=message, context=context) == "the trainer's answer"
    assert asked == [Path("/private/trainer")]
    assert not mark.exists()
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("kind", [kind for kind in TaskType if kind != TaskType.CLIENT_APP])
def test_no_other_kind_of_task_is_started(kind, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    result = launcher.InstalledAppExecutor.launch(
        object.__new__(launcher.InstalledAppExecutor), _spec(kind)
    )
    assert result.status == LaunchResultStatus.FAILED
    assert not started


def test_dependencies_that_a_run_asks_for_are_not_installed():
    assert "--allow-runtime-dependency-installation" not in launcher.arguments(
        _spec(TaskType.CLIENT_APP)
    )


def _spec(kind):
    return ExecutionSpec(
        task_type=kind,
        runtime_api_address="127.0.0.1:1",
        token="t",
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=True,
        parent_pid=1,
        suppress_output=False,
        task_id=1,
        fab_hash=None,
    )


@pytest.mark.parametrize("error", [RuntimeError(SECRET), RecordError(SECRET)])
def test_an_institutions_log_quotes_no_record(message, context, monkeypatch, caplog, error):
    def situation(_):
        raise error

    monkeypatch.setattr(app, "_institution", situation)
    with caplog.at_level(logging.DEBUG):
        app.train(message, context)
    assert caplog.records
    assert SECRET not in caplog.text


def test_what_the_operator_can_mend_stays_in_the_log(message, context, monkeypatch, caplog):
    def situation(_):
        raise InputError("max-steps is 0")

    monkeypatch.setattr(app, "_institution", situation)
    app.train(message, context)
    assert "max-steps is 0" in caplog.text


def test_a_place_names_file_line_and_function():
    try:
        int("no number")
    except ValueError as error:
        assert place(error).startswith("ValueError at test_executor.py:")
        assert "no number" not in place(error)

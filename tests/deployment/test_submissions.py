"""Submissions against a SuperLink that is a dictionary: what is true, and what goes on."""

import json
import time
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cli.main import app
from deployment import server, submissions, superlink_client
from deployment.errors import FlowerError, Unanswered
from fedlora.config import config
from fedlora.errors import InputError


class Link:
    """A SuperLink: run -> its status and details, and for how long a server has had each run."""

    def __init__(self):
        self.runs = {}
        self.configs = []
        self.broken = None
        self.silent = None
        self.age = 10.0

    def start(self, server, directory, values):
        assert (directory / "pyproject.toml").exists()
        if self.broken:
            raise self.broken
        self.configs.append(dict(values))
        run = str(len(self.runs) + 1)
        self.runs[run] = ("running", "")
        if self.silent:
            raise self.silent
        return run

    def unfinished(self, server, directory):
        return [
            run
            for run, config in zip(self.runs, self.configs, strict=False)
            if config["run-dir"] == directory and not self.runs[run][0].startswith("finished")
        ]

    def status(self, server, run):
        return *self.runs.get(run, ("unknown", "")), self.age

    def stop(self, server, run):
        if not self.status(server, run)[0].startswith(("finished", "unknown")):
            self.runs[run] = ("finished:stopped", "")


@pytest.fixture
def link(monkeypatch):
    made = Link()
    for name in ("start", "status", "stop", "unfinished"):
        monkeypatch.setattr(superlink_client, name, getattr(made, name))
    return made


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("keys", "institutions", "results", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "keys" / "ca.crt").touch()
    (tmp_path / "keys" / "superexec.secret").touch()
    monkeypatch.setenv("FEDLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("FEDLORA_INSTITUTIONS", str(tmp_path / "institutions"))
    monkeypatch.setenv("FEDLORA_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("FEDLORA_SUPERLINK", "localhost:1")
    return superlink_client.server()


@pytest.fixture
def deployed():
    values = {
        "data.source": "institutions",
        "data.institutions": 3,
        "data.labels": '["it\'s", "b"]',
    }
    return config.from_flat(values)


def _finish(submission, link, *, result=True, status="finished:completed", details=""):
    link.runs[submission.runs[-1]] = (status, details)
    if result:
        (submission.directory / "result.json").write_text('{"accuracy": 0.5}')


def _pass(here, **since):
    """What one pass of the server did, and what waits for the next one."""
    actions, waiting = submissions.proceed(here, **since)
    return [*actions, *(f"{name}: {reason}" for name, reason in waiting.items())]


def _round(submission, number):
    with (submission.directory / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": number}) + "\n")


def test_a_submission_carries_the_whole_configuration_and_its_directory(here, link, deployed):
    made = submissions.submit(here, deployed, "one")
    (sent,) = link.configs
    assert sent == {**deployed.shared(), "run-dir": str(here.results / "one")}
    assert submissions.find(here, "one") == made
    assert made.state == "running"


def test_what_the_superlink_does_not_take_leaves_nothing(here, link, deployed):
    link.broken = FlowerError("the SuperLink is away")
    with pytest.raises(FlowerError):
        submissions.submit(here, deployed, "one")
    assert not (here.results / "one").exists()


@pytest.mark.parametrize(
    "error",
    [Unanswered("ReadTimeout"), KeyboardInterrupt(), OSError(28, "No space left on device")],
)
def test_a_run_that_was_made_without_an_answer_is_taken_and_not_made_again(
    here, link, deployed, error
):
    link.silent = error
    with pytest.raises((Unanswered, KeyboardInterrupt, OSError)):
        submissions.submit(here, deployed, "one")
    assert submissions.observe(here, "one").state == "running"
    assert len(_pass(here)) == 1
    assert list(link.runs) == ["1"]
    assert submissions.find(here, "one").runs == ("1",)


def test_a_submission_without_an_answer_is_made_when_the_superlink_has_none(here, link, deployed):
    link.broken = Unanswered("ReadTimeout")
    with pytest.raises(Unanswered):
        submissions.submit(here, deployed, "one")
    link.broken = None
    submissions.submit(here, deployed, "other")
    assert len(_pass(here)) == 1
    assert submissions.find(here, "one").runs == ("2",)


def test_a_simulations_configuration_and_a_taken_name_are_refused(here, link, deployed):
    with pytest.raises(InputError, match="institutions"):
        submissions.submit(here, config.from_flat({}), "one")
    submissions.submit(here, deployed, "one")
    with pytest.raises(InputError, match="another --name"):
        submissions.submit(here, deployed, "one")


@pytest.mark.parametrize(
    ("result", "status", "details", "state"),
    [
        (True, "finished:completed", "", "completed"),
        (False, "finished:completed", "", "failed"),
        (True, "finished:failed", "ServerApp failed with exception: no one left", "failed"),
        (False, "finished:stopped", "", "stopped"),
        (True, "running", "", "running"),
        (False, "finished:failed", submissions.INTERRUPTED[0], "running"),
        (True, "finished:failed", submissions.INTERRUPTED[0], "completed"),  # it ended just before
        (True, "unknown", "", "completed"),
    ],
)
def test_completed_means_a_result_and_flowers_word(
    here, link, deployed, result, status, details, state
):
    _finish(
        submissions.submit(here, deployed, "one"),
        link,
        result=result,
        status=status,
        details=details,
    )
    found = submissions.observe(here, "one")
    assert found.state == state
    assert submissions.find(here, "one").state == state
    assert "exception" not in found.details


def test_a_run_whose_server_died_goes_on_in_the_same_directory(here, link, deployed):
    made = submissions.submit(here, deployed, "one")
    assert _pass(here) == []  # it runs
    (line,) = _pass(here, since=time.monotonic() - 9)
    assert "continues after round 0" in line
    assert link.runs == {"1": ("finished:stopped", ""), "2": ("running", "")}
    assert link.configs[0] == link.configs[1]
    again = submissions.find(here, "one")
    assert again.runs == ("1", "2")
    _finish(again, link)
    _pass(here)
    assert submissions.find(here, "one").state == "completed"
    assert _pass(here, since=time.monotonic()) == []
    assert made.directory == again.directory


def test_a_stopped_run_stays_stopped(here, link, deployed):
    submissions.submit(here, deployed, "one")
    assert submissions.stop(here, "one").state == "stopped"
    assert _pass(here, since=time.monotonic()) == []
    assert link.runs == {"1": ("finished:stopped", "")}


def _full(path, *_):
    raise OSError(28, "No space left on device")  # as a write does, without the file's name


def test_on_a_full_disk_flower_gets_no_run_that_cannot_be_recorded(
    here, link, deployed, monkeypatch
):
    submissions.submit(here, deployed, "one")
    link.runs["1"] = ("finished:failed", submissions.INTERRUPTED[0])
    with monkeypatch.context() as patched:
        patched.setattr(submissions, "write_atomic", _full)
        for _ in range(3):
            actions, waiting = submissions.proceed(here)
            assert not actions and "No space left" in waiting["one"]
    assert list(link.runs) == ["1"]
    assert _pass(here) == ["one continues after round 0 as Flower's run 2"]


def _raise(error):
    raise error


@pytest.fixture
def looks(here, monkeypatch, caplog):
    """Passes of the keeper, ``seconds`` after the one before, and what each logged."""
    caplog.set_level("INFO")
    now = [1000.0]
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(superlink_client, "register", lambda _: {})
    made = server.Keeper(here, since=time.monotonic())

    def look(seconds=5.0):
        now[0] += seconds
        caplog.clear()
        made.look()
        return caplog.messages

    return look


def test_a_failed_or_stopped_run_continues_in_its_directory(here, link, deployed):
    made = submissions.submit(here, deployed, "one")
    _round(made, 1)
    link.runs["1"] = ("finished:failed", "ServerApp failed with exception: 0 institutions")
    assert _pass(here) == ["one failed: 0 institutions"]
    with pytest.raises(InputError, match="under another configuration"):
        submissions.submit(here, deployed.replace({"federation.rounds": 7}), "one")
    again = submissions.submit(here, deployed, "one")
    assert (again.state, again.details, again.rounds, again.tries) == ("running", "", 1, 1)
    assert again.runs == ("2",) and link.configs[0] == link.configs[1]
    submissions.stop(here, "one")
    assert submissions.submit(here, deployed, "one").runs == ("3",)
    _finish(submissions.find(here, "one"), link)
    with pytest.raises(InputError, match="one is completed"):
        submissions.submit(here, deployed, "one")


def test_exit_codes_tell_the_truth(here, link, deployed, tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text(deployed.to_toml())

    def code(*arguments):
        return CliRunner().invoke(app, ["deploy", *arguments]).exit_code

    assert code("submit", str(file), "--name", "one") == 0
    assert code("submit", str(file), "--name", "one") == 2  # it runs
    listed = CliRunner().invoke(app, ["deploy", "list", "--json"])
    (one,) = json.loads(listed.stdout)["submissions"]
    assert listed.exit_code == 0 and (one["name"], one["state"]) == ("one", "running")
    assert code("stop", "one") == code("submit", str(file), "--name", "one") == 0
    assert code("stop", "two") == 2
    (here.results / "two").mkdir()
    (here.results / "two" / "submission.json").write_text("{")
    listed = CliRunner().invoke(app, ["deploy", "list"])
    assert listed.exit_code == 4 and "two" in listed.stderr and "one: running" in listed.stdout
    link.broken = FlowerError("the SuperLink is away")
    assert code("submit", str(file), "--name", "three") == 4
    link.broken, link.silent = None, Unanswered("ReadTimeout")
    assert code("submit", str(file), "--name", "four") == 4
    assert submissions.find(here, "four").state == "running"

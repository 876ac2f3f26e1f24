"""Submissions against a SuperLink that is a dictionary: what is true, and what goes on."""

import contextlib
import dataclasses
import json
import shutil
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from flwr.proto.control_pb2 import ListRunsResponse
from flwr.proto.run_pb2 import Run, RunStatus
from typer.testing import CliRunner

from cli.main import app
from deployment import keys, server, submissions, superlink_client
from deployment.errors import FileError, FlowerError, Unanswered
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


def test_the_tracking_section_stays_at_the_server_and_its_app_finds_it(here, link, deployed):
    from server import run_directory

    tracked = deployed.replace(
        {"tracking.mlflow": "http://inside:5000", "tracking.tensorboard": "t"}
    )
    made = submissions.submit(here, tracked, "one")
    (sent,) = link.configs
    assert not any(key.startswith("tracking.") for key in sent)
    found = run_directory.with_tracking(config.from_context(sent, run_id=1))
    assert found.tracking == tracked.tracking and found.flat() == made.config


def test_the_directory_of_a_submission_is_free_for_the_run(here, link, deployed):
    from server.run_directory import RunDirectory

    made = submissions.submit(here, deployed, "one")
    for name in ("submission.json", "config.toml"):
        (made.directory / f".{name}.k1ll3d").touch()  # what a kill leaves of a write
    assert RunDirectory(made.directory).check(config.from_flat(made.config)) is False
    (made.directory / ".other").touch()
    with pytest.raises(InputError, match="holds other files"):
        RunDirectory(made.directory).check(config.from_flat(made.config))


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


def test_stopping_a_submission_without_an_answer_stops_its_run(here, link, deployed):
    link.silent = Unanswered("ReadTimeout")
    with pytest.raises(Unanswered):
        submissions.submit(here, deployed, "one")
    assert submissions.stop(here, "one").state == "stopped"
    assert link.runs == {"1": ("finished:stopped", "")}


@pytest.mark.parametrize("result", [True, False])
def test_a_run_that_ends_just_before_it_is_stopped_keeps_its_end(
    here, link, deployed, monkeypatch, result
):
    made = submissions.submit(here, deployed, "one")

    def stop(server, run):
        _finish(made, link, result=result)  # and stopping an ended run does nothing

    monkeypatch.setattr(superlink_client, "stop", stop)
    state = "completed" if result else "failed"
    assert submissions.stop(here, "one").state == state
    assert submissions.find(here, "one").state == state


@pytest.mark.parametrize(
    ("code", "body", "kind"),
    [
        (None, "", Unanswered),  # it hangs up
        (500, '{"detail": "x"}', Unanswered),
        (412, '{"detail": "x"}', FlowerError),
        (401, "", FlowerError),
    ],
)
def test_an_error_says_whether_the_superlink_may_have_done_it(here, code, body, kind):
    here.ca.write_bytes(keys.make_authority().pem)
    request = httpx.Request("POST", "https://x")
    error = httpx.ReadTimeout("x", request=request)
    if code:
        error = httpx.HTTPStatusError(
            "x", request=request, response=httpx.Response(code, text=body)
        )
    with pytest.raises(FlowerError) as caught, superlink_client._superlink(here):
        raise error
    assert type(caught.value) is kind


def test_a_superlink_that_is_not_there_has_done_nothing(tmp_path, here):
    authority = keys.make_authority()
    here.ca.write_bytes(authority.pem)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = dataclasses.replace(here, superlink=f"127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(FlowerError) as caught:
            superlink_client.unfinished(away, "x")
    assert type(caught.value) is FlowerError


@pytest.mark.parametrize("name", ["../x", "", "a b", ".x"])
def test_a_name_is_no_path(here, link, deployed, name):
    with pytest.raises(InputError, match="--name"):
        submissions.submit(here, deployed, name)
    assert not link.runs


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


@pytest.mark.parametrize("error", [Unanswered("500"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("made", [True, False])
def test_a_continuation_that_fails_once_is_made_in_the_next_pass(here, link, deployed, error, made):
    submissions.submit(here, deployed, "one")
    link.silent, link.broken = (error, None) if made else (None, error)
    _pass(here, since=time.monotonic() - 9)
    assert link.runs["1"] == ("running", "")
    link.silent = link.broken = None
    (line,) = _pass(here, since=time.monotonic() - 9)
    assert line == "one continues after round 0 as Flower's run 2"
    assert link.runs == {"1": ("finished:stopped", ""), "2": ("running", "")}
    found = submissions.find(here, "one")
    assert (found.state, found.runs) == ("running", ("1", "2"))


@pytest.mark.parametrize("unstopped", ["1", "2"])
def test_a_stop_that_fails_for_one_of_two_runs_can_be_repeated(
    here, link, deployed, monkeypatch, unstopped
):
    submissions.submit(here, deployed, "one")
    link.silent = Unanswered("500")
    _pass(here, since=time.monotonic() - 9)

    def fails(server, run):
        if run == unstopped:
            raise Unanswered("500")
        link.stop(server, run)

    with monkeypatch.context() as patched, pytest.raises(Unanswered):
        patched.setattr(superlink_client, "stop", fails)
        submissions.stop(here, "one")
    assert submissions.stop(here, "one").state == "stopped"
    assert {status for status, _ in link.runs.values()} == {"finished:stopped"}


def test_a_run_that_begins_as_the_server_starts_is_started_once(here, link, deployed):
    submissions.submit(here, deployed, "one")
    for status in ("pending", "starting", "running"):
        link.runs["1"] = (status, "")
        assert _pass(here, since=time.monotonic() - 11) == []
    assert list(link.runs) == ["1"]


def test_a_run_is_as_old_as_the_superlink_says(here, monkeypatch):
    found = Run(status=RunStatus(status="running"), starting_at="2026-01-01T10:00:00+00:00")
    said = ListRunsResponse(run_dict={7: found}, now="2026-01-01T10:00:02.500000+00:00")
    link = SimpleNamespace(ListRuns=lambda request: said)
    monkeypatch.setattr(superlink_client, "_superlink", lambda _: contextlib.nullcontext(link))
    assert superlink_client.status(here, "7") == ("running", "", 2.5)
    found.starting_at = ""
    said = ListRunsResponse(run_dict={7: found}, now=said.now)
    assert superlink_client.status(here, "7")[2] == 0
    assert superlink_client.status(here, "8")[0] == "unknown"


def test_a_run_that_never_gets_on_is_given_up(here, link, deployed):
    made = submissions.submit(here, deployed, "one")
    lost = ("finished:failed", submissions.INTERRUPTED[0])
    for number in range(1, 20):
        link.runs[submissions.find(here, "one").runs[-1]] = lost
        if number == 3:
            _round(made, 1)
        _pass(here)
    found = submissions.find(here, "one")
    assert found.state == "failed"
    assert len(found.runs) == 3 + submissions.MAX_TRIES  # a new round counts anew


def test_a_stopped_run_stays_stopped(here, link, deployed):
    submissions.submit(here, deployed, "one")
    assert submissions.stop(here, "one").state == "stopped"
    assert _pass(here, since=time.monotonic()) == []
    assert link.runs == {"1": ("finished:stopped", "")}


def test_resuming_without_the_superlink_changes_nothing(here, link, deployed):
    submissions.submit(here, deployed, "one")
    stopped = submissions.stop(here, "one")
    link.broken = FlowerError("away")
    with pytest.raises(FlowerError):
        submissions.submit(here, deployed, "one")
    assert submissions.find(here, "one") == stopped


@pytest.mark.parametrize(
    "error", [Unanswered("no answer"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("made", [True, False])
def test_a_resumed_run_without_an_answer_is_seen_and_goes_on(here, link, deployed, error, made):
    submissions.submit(here, deployed, "one")
    submissions.stop(here, "one")
    link.silent, link.broken = (error, None) if made else (None, error)
    with pytest.raises((Unanswered, KeyboardInterrupt, OSError)):
        submissions.submit(here, deployed, "one")
    link.silent = link.broken = None
    assert submissions.observe(here, "one").state == "running"
    assert len(_pass(here, since=time.monotonic())) == 1
    found = submissions.find(here, "one")
    assert (found.state, found.runs[-1]) == ("running", "2")
    assert list(link.runs) == ["1", "2"]
    assert link.runs["2"] == ("running", "")


BAD_RECORDS = {
    "empty": "",
    "torn": '{"name": "on',
    "a list": "[]",
    "without keys": "{}",
    "of a later version": '{"runs": [], "later": 1}',
    "nested": "[" * 100_000,
    "a directory": None,
}


@pytest.fixture(params=BAD_RECORDS.values(), ids=BAD_RECORDS)
def bad(request, here, link, deployed):
    """The record of submission "one", which cannot be read; beside it is submission "two"."""
    for name in ("one", "two"):
        submissions.submit(here, deployed, name)
    file = here.results / "one" / "submission.json"
    file.unlink()
    file.mkdir() if request.param is None else file.write_text(request.param)
    return file


def test_a_record_that_cannot_be_read_waits_is_kept_and_holds_up_no_other(here, link, bad):
    before = None if bad.is_dir() else bad.read_text()
    for _ in range(2):
        actions, waiting = submissions.proceed(here, since=time.monotonic() - 9)
        assert [line.partition(" after")[0] for line in actions] == ["two continues"]
        assert list(waiting) == ["one"] and str(bad) in waiting["one"]
    # its run is neither stopped nor started again, and its record stays as it is
    assert link.runs["1"] == ("running", "")
    assert all(sent["run-dir"].endswith("two") for sent in link.configs[1:])
    assert bad.is_dir() if before is None else bad.read_text() == before


def _full(path, *_):
    raise OSError(28, "No space left on device")  # as a write does, without the file's name


def test_rounds_that_cannot_be_read_are_named_and_the_run_does_not_begin_anew(here, link, deployed):
    submissions.submit(here, deployed, "one")
    stopped = submissions.stop(here, "one")
    file = here.results / "one" / "rounds.jsonl"
    file.write_text("{\n")
    with pytest.raises(FileError, match=str(file)):
        submissions.submit(here, deployed, "one")
    assert submissions.find(here, "one") == stopped and list(link.runs) == ["1"]


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


@pytest.mark.parametrize("error", [FlowerError("500"), Unanswered("500")])
def test_a_request_that_fails_for_one_submission_holds_up_no_other(
    here, link, deployed, monkeypatch, error
):
    for name in ("one", "two"):
        submissions.submit(here, deployed, name)

    def status(server, run):
        if run == "1":
            raise error
        return link.status(server, run)

    monkeypatch.setattr(superlink_client, "status", status)
    first, second = sorted(_pass(here, since=time.monotonic() - 9))
    assert first == "one: 500" and second.startswith("two continues")


def test_waiting_shows_each_round_once_and_crosses_a_restart(here, link, deployed, monkeypatch):
    made = submissions.submit(here, deployed, "one")
    steps = iter(
        [
            lambda: _round(made, 1),
            lambda: _pass(here, since=time.monotonic()),
            lambda: _round(made, 2),
            lambda: _finish(submissions.find(here, "one"), link),
            lambda: _pass(here),
        ]
    )
    monkeypatch.setattr(submissions.time, "sleep", lambda _: next(steps)())
    shown = []
    assert submissions.follow(here, "one", lambda r: shown.append(r["round"])).state == "completed"
    assert shown == [1, 2]


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


def test_institutions_are_registered_again_each_minute_and_at_once_after_a_change(
    here, looks, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        superlink_client, "register", lambda _: calls.append(1) or {"a": "registered", "b": "no"}
    )
    monkeypatch.setattr(submissions, "proceed", lambda *_, **__: ([], {"one": "full disk"}))
    said = ["institution a: registered", "institution b: no"]
    assert looks() == [*said, "one: full disk"]
    assert looks(server.REGISTER_SECONDS - 1) == [] and len(calls) == 1
    assert looks(1) == said and len(calls) == 2
    (here.institutions / "b.pub").touch()
    assert looks(1) == said and len(calls) == 3


def test_a_copied_or_a_moved_directory_is_no_record_of_a_run(here, link, deployed):
    submissions.submit(here, deployed, "one")
    shutil.copytree(here.results / "one", here.results / "copy")
    _finish(submissions.find(here, "one"), link)
    assert submissions.observe(here, "one").state == "completed"
    actions, waiting = submissions.proceed(here)
    assert not actions and list(waiting) == ["copy"] and len(link.runs) == 1


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

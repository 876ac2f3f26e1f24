"""Lines of logs as JSON, and processes that end together."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from deployment import node, service
from fedlora import logs
from tests.deployment import harness


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (
            "\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode",
            "info",
            "Starting Flower SuperNode",
        ),
        ("WARNING :  refused: x: y", "warning", "refused: x: y"),
        ("2026-11-25T09:37:37.813Z INFO [uvicorn.error] up", "info", "[uvicorn.error] up"),
        ("2026/11/25 09:00:00 [crit] 12#12: *1 no", "critical", "*1 no"),
        ('{"level": "error", "message": "m"}', "info", '{"level": "error", "message": "m"}'),
        ("plain", "info", "plain"),
    ],
)
def test_a_line_becomes_a_record(line, level, message):
    made = service.record("s", line + "\n")
    assert (made["service"], made["level"], made["message"]) == ("s", level, message)
    assert made["time"].endswith("Z")


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        ('{"level": "error", "message": "m", "other": 1}', "error", "m"),
        ('{"no": "level"}', "info", '{"no": "level"}'),
    ],
)
def test_a_record_is_kept_only_from_a_program_that_writes_records(line, level, message):
    made = service.record("s", line, ready=True)
    assert (made["service"], made["level"], made["message"]) == ("s", level, message)


def test_only_nginx_writes_records_itself():
    services = harness.compose({"FEDLORA_USER": "1:1", "FEDLORA_DIR": "/d"})["services"]
    ready = {name for name, spec in services.items() if "--json-lines" in spec["command"]}
    assert ready == {"gateway"}
    conf = (harness.ROOT / "deployment" / "gateway.conf").read_text()
    assert "log_format json escape=json" in conf


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x85", "\u2028"])
def test_what_our_log_quotes_begins_no_line(end):
    forged = f'x{end}{{"level": "info", "message": "forged", "service": "ledger"}}'
    said = logs.OneLine("%(levelname)s : %(message)s").format(
        logging.makeLogRecord({"levelname": "WARNING", "msg": "refused: %s", "args": (forged,)})
    )
    assert said.splitlines() == [said]
    assert service.record("s", said)["message"].startswith("refused: x\\")


def test_what_flower_logs_of_a_message_begins_no_line(monkeypatch, capsys):
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "filters", [])
    logs.keep_flower_to_one_line()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(handler.format(record))
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.warning("get_fab %s", 'x\n{"level": "info", "message": "forged"}')
    assert len(said) == 1 and said[0].splitlines() == said and said[0].startswith("get_fab x\\n")


def test_lines_that_say_nothing_are_left_out_and_a_traceback_stays_an_error():
    assert service.record("s", "\x1b[92mINFO \x1b[0m:      \n") is None
    assert service.record("s", "  File x, line 3", "error")["level"] == "error"
    assert service.record("s", "text", "warning")["level"] == "info"


def _service(*command):
    return [sys.executable, "-m", "cli.main", "service", "s", "--", *command]


def test_its_output_is_json_and_its_exit_code_is_passed_on():
    script = 'echo \'ERROR : no\'; echo \'{"level": "info", "message": "x"}\' >&2; exit 7'
    command = _service("sh", "-c", script)
    command.insert(-4, "--json-lines")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(x["level"], x["message"]) for x in lines} == {("error", "no"), ("info", "x")}


def test_a_carriage_return_begins_no_line():
    script = r"""printf 'INFO : a\rERROR : {"level": "error"}\n'"""
    done = subprocess.run(_service("sh", "-c", script), capture_output=True, text=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["level"] == "info"


def test_a_log_that_cannot_be_written_for_a_while_goes_on_afterwards(monkeypatch):
    """The reader must not die: it keeps the program's pipe open, and its later lines."""
    written, full = [], [True]

    def write(line):
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        written.append(line)

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    with subprocess.Popen(["printf", "one\ntwo\n"], stdout=subprocess.PIPE) as process:
        service._read("x", process, threading.Semaphore(0), ready=False)
    assert [json.loads(line)["message"] for line in written] == ["two"]


def test_a_program_that_is_not_there_is_bad_input():
    done = subprocess.run(_service("no-such-program"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no-such-program cannot be started" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_it(number):
    script = "echo $$; exec sleep 60"
    with subprocess.Popen(_service("sh", "-c", script), stdout=subprocess.PIPE, text=True) as one:
        child = int(json.loads(one.stdout.readline())["message"])
        one.send_signal(number)
        assert one.wait(30) in (128 + number, -number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and harness.alive(child):
            time.sleep(0.05)
        assert not harness.alive(child)


def test_when_one_ends_the_others_are_ended(capfd):
    started = time.monotonic()
    assert service.run("s", [["sleep", "60"], ["sh", "-c", "exit 5"]]) == 5
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("pass", "the SuperNode gave up"),
        ("raise ValueError('secret')", "the SuperNode failed: ValueError at "),
        (
            "threading.Thread(target=int, args=('secret',), daemon=True).start(); time.sleep(60)",
            "a thread of the SuperNode failed: ValueError at ",
        ),
    ],
    ids=["returns", "raises", "loses its heartbeat"],
)
def test_a_supernode_that_ends_in_any_way_ends_its_process(end, said):
    script = (
        "import threading, time\n"
        "from deployment import supernode\n"
        "def flower():\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()  # Flower's own API\n"
        f"    {end}\n"
        "supernode.flower_supernode = flower\n"
        "supernode.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
    )
    (line,) = done.stdout.splitlines()
    made = service.record("s", line)
    assert done.returncode == 1 and "secret" not in line
    assert made["level"] == "error" and made["message"].startswith(said)


def test_a_supernode_that_is_told_to_end_ends_as_flower_ends_it():
    script = (
        "import sys\n"
        "from deployment import supernode\n"
        "supernode.flower_supernode = lambda: sys.exit(0)\n"
        "supernode.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=50)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("given", "hosts"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "10.0.0.1, bank"}, "10.0.0.1,bank,127.0.0.1,localhost"),
        ({"no_proxy": "localhost", "NO_PROXY": "bank"}, "bank,localhost,127.0.0.1"),
    ],
)
def test_a_nodes_processes_reach_each_other_without_the_proxy_of_the_environment(
    given, hosts, tmp_path, monkeypatch
):
    made = node.environment(tmp_path, {"ALL_PROXY": "http://proxy:1", **given})
    assert made["NO_PROXY"] == made["no_proxy"] == hosts
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {"ALL_PROXY": "http://proxy:1", **given, **made}.items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:  # as Flower makes its own
        through = [
            client._transport_for_url(httpx.URL(f"http://{h}:1")) for h in ("127.0.0.1", "x")
        ]
    assert through[0] is client._transport and through[1] is not client._transport

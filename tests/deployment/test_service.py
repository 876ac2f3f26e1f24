"""Lines of logs as JSON, and processes that end together."""

import json
import signal
import subprocess
import sys
import time

import pytest

from deployment import service
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

"""Processes forked from one that has imported everything."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from simulation.engines.forkserver import ForkServer

SCRIPT = """
import os, sys
print(sys.argv[1:], os.environ["ASKED"], os.environ.get("SERVER"), os.getcwd(),
      "colorsys" in sys.modules, os.getpid(), flush=True)
if "stay" in sys.argv:
    import time
    time.sleep(60)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def forks():
    import colorsys  # noqa: F401  (forks are to have it)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVER", "its own")
        server = ForkServer()
    with contextlib.closing(server):
        yield server


@pytest.fixture
def start(forks, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)

    def go(*arguments):
        command = f"exec {forks.py_executable} {shlex.join([str(script), *arguments])}"
        return subprocess.Popen(
            ["bash", "-c", command],
            env={"ASKED": "yes", "PATH": os.environ["PATH"]},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return go


def gone(pid):
    """Whether a process ends within some seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_fork_has_what_its_owner_imported_and_is_else_what_was_asked_for(start, tmp_path):
    process = start("a", "b c")
    said, errors = process.communicate(timeout=60)
    expected = f"['a', 'b c'] yes None {tmp_path} True "
    assert said.startswith(expected), (said, errors)
    assert int(said.split()[-1]) != process.pid
    assert process.returncode == 7


def test_forks_are_processes_of_their_own(start):
    both = [start(), start()]
    pids = {process.communicate(timeout=60)[0].split()[-1] for process in both}
    assert len(pids) == 2


def test_a_fork_ends_with_its_stand_in(start):
    process = start("stay")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[-1])
    process.kill()
    assert gone(pid)
    process.communicate()


def test_a_stand_in_ends_with_its_fork(start):
    process = start("stay")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[-1])
    os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=20) == 256 - signal.SIGKILL
    process.communicate()


def test_forks_end_when_the_servers_owner_dies(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    owner = (
        "import os, subprocess, sys\n"
        "from simulation.engines.forkserver import ForkServer\n"
        "forks = ForkServer()\n"
        f"subprocess.Popen(['bash', '-c', forks.py_executable + ' {script} stay'])\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", owner],
        env={**os.environ, "ASKED": "yes", "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[-1])
    process.kill()
    assert gone(pid)
    process.communicate()
    for _ in range(100):
        if not (left := list(tmp_path.glob("fedlora-fork-*"))):
            break
        time.sleep(0.05)
    assert not left


def staying(server, script):
    """A stand-in whose fork stays, and the fork's process id."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {server.py_executable} {script} stay"],
        env={**os.environ, "ASKED": "yes"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().split()[-1])


def test_forks_end_with_the_server_however_it_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with contextlib.closing(ForkServer()) as server:
        process, pid = staying(server, script)
        os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
        assert gone(pid)
        assert process.wait(timeout=20) == 1
        with pytest.raises(ChildProcessError, match="ended with -9"):
            server.check()
    process.communicate()


def test_forks_end_when_the_server_is_closed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    server = ForkServer()
    process, pid = staying(server, script)
    server.check()
    server.close()
    server.close()
    assert gone(pid)
    assert process.wait(timeout=20) == 1
    with pytest.raises(ChildProcessError, match="ended with 0"):
        server.check()
    process.communicate()


def test_a_long_environment_reaches_a_fork(forks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os; print(len(os.environ['LONG']))")
    done = subprocess.run(
        ["bash", "-c", f"exec {forks.py_executable} {script}"],
        env={"LONG": "ü" * 60_000, "ALSO": "y" * 100_000, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "60000"

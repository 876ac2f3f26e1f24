"""Ray's workers on this machine as forks of one process that has imported everything.

Imports are most of what a worker takes to start (three seconds of a core) and of what it holds
(some 300 MB, which forks share). Ray starts each worker by the command that it is given
(``py_executable``): a small stand-in, which hands its arguments, environment and files over to the
fork server and ends with the worker. Either one's end is the other's.

Nothing secret is made before the fork: keys come from the operating system when a round needs them.

Only the standard library is imported here, since the stand-in is this file too.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STREAMS = (0, 1, 2)
LENGTH = struct.Struct("!I")  # of what a stand-in asks for


class ForkServer:
    """The server's process, which ends with the block that it is used in, or with its owner.

    Args:
        modules: What it imports. None may touch a GPU, start threads of Python or be Ray, which
            reads a worker's environment as soon as it is imported.
        environment: Of the server from its start, beside this process's own.

    Raises:
        AttributeError, OSError: Where the system has not what it takes.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        os.close(os.pidfd_open(os.getpid()))  # whether there is such a thing
        self._folder = tempfile.mkdtemp(prefix="fedlora-fork-")  # only this user can enter
        self._socket = str(Path(self._folder) / "socket")
        with contextlib.ExitStack() as undo, socket.socket(socket.AF_UNIX) as listener:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            listener.bind(self._socket)
            listener.listen()  # who comes while it imports waits
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listener.fileno()), *modules],
                env={**os.environ, **environment},
                cwd=Path(__file__).resolve().parents[2],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,  # its end is this process's
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process alone
            )
            undo.pop_all()

    @property
    def py_executable(self) -> str:
        """What Ray starts in place of Python."""
        words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), self._socket]
        return shlex.join(words)

    def check(self) -> None:
        """Raise a RuntimeError when the server has ended: no worker could start any more."""
        if self._process.poll() is not None:
            code = self._process.returncode
            raise RuntimeError(f"the process that workers are forked from ended with {code}")

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and what it forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it imports, so there are no workers yet
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Fork a process for each request, until stdin ends; forks end with this process."""
    from experiments import simulate
    from fedlora.startup import importing

    simulate.quiet_libraries()
    with importing():
        for name in modules:
            importlib.import_module(name)
    gc.freeze()
    try:
        _serve(listener)
    finally:
        shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)


def _serve(listener: socket.socket) -> None:
    events = select.poll()
    events.register(0)
    events.register(listener, select.POLLIN)
    workers: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> worker, its stand-in
    while True:
        for descriptor, what in events.poll():
            if descriptor == 0 and what & (select.POLLHUP | select.POLLERR):
                return
            if descriptor == listener.fileno():
                asked, _ = listener.accept()
                worker = _forked(asked, listener, workers)
                if worker:
                    ended = os.pidfd_open(worker)
                    workers[ended] = worker, asked
                    events.register(ended, select.POLLIN)
                    events.register(asked, select.POLLIN)
            elif descriptor in workers:
                worker, asked = workers.pop(descriptor)
                _, status = os.waitpid(worker, 0)
                events.unregister(descriptor)
                os.close(descriptor)
                with contextlib.suppress(KeyError):  # it ended before
                    events.unregister(asked)
                with contextlib.suppress(OSError):
                    asked.send(str(os.waitstatus_to_exitcode(status)).encode())
                asked.close()
            for worker, asked in workers.values():
                if asked.fileno() == descriptor:  # it sends nothing more, so it has ended
                    events.unregister(descriptor)
                    os.kill(worker, signal.SIGKILL)


def _forked(
    asked: socket.socket,
    listener: socket.socket,
    others: Mapping[int, tuple[int, socket.socket]],
) -> int:
    """The worker that a stand-in asks for, or 0; in the worker itself this never returns."""
    length, files, _, _ = socket.recv_fds(asked, LENGTH.size, len(STREAMS))
    with asked.makefile("rb") as stream:
        message = stream.read(*LENGTH.unpack(length)) if len(files) == len(STREAMS) else b""
    if not message:  # it has ended
        asked.close()
        return 0
    from fedlora.startup import end_with_parent

    server = os.getpid()
    worker = os.fork()
    if worker:
        for file in files:
            os.close(file)
        return worker
    code = 1
    try:
        end_with_parent()
        if os.getppid() != server:
            sys.exit("the fork server has ended")
        os.setpgid(0, 0)
        listener.close()
        asked.close()
        for ended, (_, other) in others.items():
            os.close(ended)
            other.close()
        for file, stream in zip(files, STREAMS, strict=True):
            os.dup2(file, stream)
            os.close(file)
        _become(json.loads(message))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(asked: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.argv = asked["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def stand_in(path: str, arguments: Sequence[str]) -> int:
    """Ask for a worker and wait for its end; gives its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
        message = json.dumps(asked).encode()
        socket.send_fds(server, [LENGTH.pack(len(message))], STREAMS)
        server.sendall(message)
        code = server.recv(64)
    return int(code) if code else 1


if __name__ == "__main__":
    if __spec__ is None:  # called by its path: a stand-in
        sys.exit(stand_in(sys.argv[1], sys.argv[2:]))
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])

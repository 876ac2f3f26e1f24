"""Ray's workers on this machine as forks of the process that starts the run.

Imports are most of what a worker takes to start (three seconds of a core), and with base model and
records most of what it holds; a fork has them already and shares their memory. Ray starts each
worker by the command that it is given (``py_executable``): a small stand-in, which hands its
arguments, environment and files over to the fork server and ends with the worker. Either one's end
is the other's.

The fork server is itself a fork, made before Ray is imported, which reads a worker's environment as
soon as it is. Nothing secret is made before the fork: keys come from the operating system when a
round needs them.

Only the standard library is imported here, since the stand-in is this file too.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

STREAMS = (0, 1, 2)
LENGTH = struct.Struct("!I")  # of what a stand-in asks for


class ForkServer:
    """A fork of this process that forks on request, until `close` or the end of this process.

    What this process has imported and loaded by now, its forks have. It must not have touched a
    GPU, started threads that matter to a fork, or imported Ray.

    Raises:
        AttributeError, OSError: Where the system has not what it takes.
    """

    def __init__(self) -> None:
        os.close(os.pidfd_open(os.getpid()))  # whether there is such a thing
        self._folder = tempfile.mkdtemp(prefix="fedlora-fork-")  # only this user can enter
        self._socket = str(Path(self._folder) / "socket")
        with contextlib.ExitStack() as undo, socket.socket(socket.AF_UNIX) as listener:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            listener.bind(self._socket)
            listener.listen()
            alive, self._alive = os.pipe()  # its end is this process's
            self._owner = os.getpid()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads that draw a display
                self._pid = os.fork()
            if not self._pid:
                _run(lambda: self._serve(listener, alive))
            os.close(alive)
            undo.pop_all()
        self._ended = os.pidfd_open(self._pid)
        self._code: int | None = None
        atexit.register(self.close)

    def _serve(self, listener: socket.socket, alive: int) -> None:
        """The server's whole life."""
        os.close(self._alive)
        os.setsid()  # Ctrl-C is for its owner alone
        os.dup2(alive, 0)
        os.close(alive)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
        _plain_streams()
        gc.collect()
        gc.freeze()
        try:
            _serve(listener)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def py_executable(self) -> str:
        """What Ray starts in place of Python."""
        words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), self._socket]
        return shlex.join(words)

    @property
    def alive(self) -> bool:
        """Whether it still forks."""
        return not self._has_ended(0.0)

    def check(self) -> None:
        """Raise a RuntimeError when the server has ended: no worker could start any more."""
        if not self.alive:
            raise RuntimeError(f"the process that workers are forked from ended with {self._code}")

    def close(self) -> None:
        """End it, and what it forked; a second time, or in another process, this does nothing."""
        if self._alive < 0 or os.getpid() != self._owner:
            return
        os.close(self._alive)
        self._alive = -1
        if not self._has_ended(5.0):
            os.kill(self._pid, signal.SIGKILL)
            self._has_ended(5.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _has_ended(self, seconds: float) -> bool:
        if self._code is None and select.select([self._ended], [], [], seconds)[0]:
            _, status = os.waitpid(self._pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
            os.close(self._ended)
        return self._code is not None

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(work: Callable[[], None]) -> NoReturn:
    """All that a forked process still does."""
    code = 1
    try:
        work()
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


def _serve(listener: socket.socket) -> None:
    events = select.poll()
    events.register(0)
    events.register(listener, select.POLLIN)
    workers: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> worker, its stand-in
    while True:
        for descriptor, what in events.poll():
            if descriptor == 0 and what & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
            if descriptor == listener.fileno():
                asked, _ = listener.accept()
                worker = 0
                with contextlib.suppress(OSError):  # one that asks wrongly, or too late, gets none
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
    asked.settimeout(10.0)
    length, files, _, _ = socket.recv_fds(asked, LENGTH.size, len(STREAMS))
    message, size = b"", LENGTH.unpack(length)[0] if len(length) == LENGTH.size else 0
    if len(files) == len(STREAMS):
        with asked.makefile("rb") as stream:
            message = stream.read(size)
    if not message or len(message) < size:  # it has ended
        for file in files:
            os.close(file)
        asked.close()
        return 0
    asked.settimeout(None)
    server = os.getpid()
    worker = os.fork()
    if worker:
        for file in files:
            os.close(file)
        return worker

    def become() -> None:
        from fedlora.startup import end_with_parent

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

    _run(become)


def _plain_streams() -> None:
    """Files in the place of whatever the process that started the run has for them."""
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


def _become(asked: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    _plain_streams()
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
    sys.exit(stand_in(sys.argv[1], sys.argv[2:]))

"""A fork server that starts Ray's workers on this machine as forks of the run's process.

Imports dominate the start of a worker (three seconds of a core). Imports, base model and records
take most of its memory. A fork has all three at once and shares their memory.

Ray starts a worker by a command (``py_executable``). Here the command runs a small stand-in
process. The stand-in sends its arguments, environment and files to the fork server, and the fork
becomes the worker. When the stand-in or the worker ends, the other ends too.

The fork server is itself a fork of the run's process. It is made before Ray is imported, because
Ray reads a worker's environment at import. No secret exists before the fork: keys come from the
operating system in the round that needs them.

This file imports the standard library only, because the stand-in runs it as a script.
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
REQUEST_LENGTH = struct.Struct("!I")  # bytes of a stand-in's request, sent before it


class ForkServer:
    """A fork of this process that forks on request, until `close` or the end of this process.

    Forks share the modules and objects that this process has loaded. The process must not have
    used a GPU, imported Ray, or started threads that a fork needs.

    Raises:
        AttributeError, OSError: If the system lacks pidfds or Unix sockets.
    """

    def __init__(self) -> None:
        os.close(os.pidfd_open(os.getpid()))  # fails early where pidfds are missing
        self._folder = tempfile.mkdtemp(prefix="fedlora-fork-")  # with access for this user only
        self._socket = str(Path(self._folder) / "socket")
        with contextlib.ExitStack() as undo, socket.socket(socket.AF_UNIX) as listener:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            listener.bind(self._socket)
            listener.listen()
            alive, self._alive = os.pipe()  # the pipe closes when this process ends
            self._owner = os.getpid()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # a display has threads
                self._pid = os.fork()
            if not self._pid:
                _run(lambda: self._serve(listener, alive))
            os.close(alive)
            undo.pop_all()
        self._ended = os.pidfd_open(self._pid)
        self._code: int | None = None
        atexit.register(self.close)

    def _serve(self, listener: socket.socket, alive: int) -> None:
        """Run the server until this process's owner ends."""
        os.close(self._alive)
        os.setsid()  # Ctrl-C must reach the owner only
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the owner's handler is not for forks
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
        """The command that Ray runs in place of Python."""
        words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), self._socket]
        return shlex.join(words)

    def check(self) -> None:
        """Raise a ChildProcessError if the server has ended, since no worker could start then."""
        if self._has_ended(0.0):
            raise ChildProcessError(f"the fork server of the workers ended with {self._code}")

    def close(self) -> None:
        """End the server and its forks. A second call, or one in another process, does nothing."""
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


def _run(work: Callable[[], None]) -> NoReturn:
    """Run a function in a forked process, then end the process."""
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
                with contextlib.suppress(OSError):  # a malformed or late request gets no worker
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
                with contextlib.suppress(KeyError):  # the stand-in ended before
                    events.unregister(asked)
                with contextlib.suppress(OSError):
                    asked.send(str(os.waitstatus_to_exitcode(status)).encode())
                asked.close()
            for worker, asked in workers.values():
                if asked.fileno() == descriptor:  # end of file: the stand-in has ended
                    events.unregister(descriptor)
                    os.kill(worker, signal.SIGKILL)


def _forked(
    asked: socket.socket,
    listener: socket.socket,
    others: Mapping[int, tuple[int, socket.socket]],
) -> int:
    """Fork the worker of a stand-in; return its pid, or 0 for a bad request."""
    asked.settimeout(10.0)
    length, files, _, _ = socket.recv_fds(asked, REQUEST_LENGTH.size, len(STREAMS))
    message, size = (
        b"",
        REQUEST_LENGTH.unpack(length)[0] if len(length) == REQUEST_LENGTH.size else 0,
    )
    if len(files) == len(STREAMS):
        with asked.makefile("rb") as stream:
            message = stream.read(size)
    if not message or len(message) < size:  # the stand-in has ended
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
        _run_script(json.loads(message))

    _run(become)


def _plain_streams() -> None:
    """Replace the owner's stream objects with plain files."""
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


def _run_script(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    _plain_streams()
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def stand_in(path: str, arguments: Sequence[str]) -> int:
    """Request a worker and wait for its end; return its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
        message = json.dumps(asked).encode()
        socket.send_fds(server, [REQUEST_LENGTH.pack(len(message))], STREAMS)
        server.sendall(message)
        code = server.recv(64)
    return int(code) if code else 1


if __name__ == "__main__":
    sys.exit(stand_in(sys.argv[1], sys.argv[2:]))

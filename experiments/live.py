"""The live page of a run: a web server for this machine only, over the files of a run directory.

Who can read the page: somebody who knows its address, on this machine. The address has a random
part, so that other users of the machine do not know it. A web site that the browser has open cannot
read the page either: there are no CORS headers, and a request that names another host than this
machine (DNS rebinding) is refused. The page changes nothing, and it loads nothing from elsewhere.
"""

import contextlib
import hmac
import json
import secrets
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from experiments import live_state
from fedlora.runs.run_files import ROUNDS, GrowingLines

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
"""Names of this machine that a request may have in its Host header."""
PAGE = Path(__file__).with_name("templates") / "live.html"
IDLE_SECONDS = 30
"""A connection without a request is closed after this time."""


@contextlib.contextmanager
def serving(run_dir: Path) -> Iterator[str]:
    """Serve the live page of a run until the block ends.

    Args:
        run_dir: The run's directory; it may not exist yet.

    Yields:
        The page's address.
    """
    server = _Server(run_dir)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{ADDRESS}:{server.server_port}/{server.secret}/"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, run_dir: Path) -> None:
        super().__init__((ADDRESS, 0), _Handler)  # any free port
        self.secret = secrets.token_urlsafe(16)
        self._run_dir = run_dir
        self._rounds = GrowingLines(run_dir / ROUNDS)
        self._known: tuple[Any, dict[str, Any]] | None = None
        self._summarising = threading.Lock()

    def summary(self) -> bytes:
        """The run's summary as JSON; the files are read again only after a change."""
        with self._summarising:  # a thread for each request
            changed = live_state.changed(self._run_dir)
            if self._known is None or self._known[0] != changed:
                self._known = changed, live_state.summary(self._run_dir, self._rounds.read())
            known = self._known[1]
        return json.dumps(known | {"quiet": live_state.last_change(self._run_dir)}).encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has gone away."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "fedlora", ""
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        """Answer with the page or with the run's summary."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in HOSTS:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"no host of this page")
            return
        secret, _, name = self.path.removeprefix("/").partition("/")
        known = hmac.compare_digest(secret.encode(), self.server.secret.encode())
        if known and name == "":
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode()
            self._answer(HTTPStatus.OK, "text/html", page, nonce)
        elif known and name == "run.json":
            self._answer(HTTPStatus.OK, "application/json", self.server.summary())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"nothing here")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes, nonce: str = "") -> None:
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:; "
            f"script-src {own}; style-src {own}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write no log: the terminal belongs to the run."""

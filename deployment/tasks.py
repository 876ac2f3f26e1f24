"""Tasks that a SuperNode or the SuperLink hands out, of one type only.

Flower's SuperExec starts a program of Flower's by the type of each task, and these install and run
the app of the run's submitter. Here a process asks for the one type of task that it does itself.
"""

import time
from collections.abc import Iterator

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

PAUSE_SECONDS = 0.5
"""Seconds between two requests for a task."""
_SIGNED = frozenset({"/flwr.proto.Runtime/AcquireTask"})


def acquire(address: str, secret: bytes, kind: TaskType, ca: str | None = None) -> Iterator[str]:
    """The token of each task of one type, without end.

    Args:
        address: HOST:PORT of the SuperNode or the SuperLink.
        secret: The secret that this process shares with it.
        kind: The type of task; no other one is asked for.
        ca: The file of the CA certificate; None on the loopback interface, without TLS.
    """
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_SIGNED)
    client = _client(address, ca, signed)
    while True:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
        if found.HasField("task") and found.token:
            yield found.token
        else:
            time.sleep(PAUSE_SECONDS)


def connect(address: str, token: str) -> RuntimeHttpClient:
    """A connection to the SuperNode for one task."""
    return _client(address, None, RuntimeTokenHttpInterceptor(token))


def _client(address: str, ca: str | None, own: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=ca is None,
        root_certificates=ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora"), own],
        retry_invoker=make_simple_http_retry_invoker(),
    )

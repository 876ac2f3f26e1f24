"""Every assignment into a private name of Flower 1.42, in one place.

Flower is pinned to the version in which these names were read. Each function here has a test in
``tests/fedlora/test_flower_internals.py``, so that an upgrade shows which name moved. A function
imports the module that it changes when it is called: a node loads nothing of the SuperLink.
"""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

Sleep = Callable[[float], None]


def set_identity(task_id: int, run_id: int, node_id: int) -> None:
    """Tell Flower which node sends messages from this process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id


def identity() -> tuple[Any, Any, Any]:
    """The task, run and node as which Flower sees this process."""
    return TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id


def set_message_id(message: Message) -> str:
    """Give a message a new id, as a SuperLink does, and return the id."""
    message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
    return message.metadata.message_id


def use_executor(make: Callable[[], Any]) -> None:
    """Have Flower's SuperExec start tasks with the executor that ``make`` returns."""
    from flwr.supercore.superexec import run_superexec

    run_superexec.get_executor = lambda *_, **__: make()


def use_superexec_sleep(sleep: Sleep) -> None:
    """Replace the pause of the SuperExec's loop between two polls for a task.

    FLWR_SUPEREXEC_TASK_POLL_INTERVAL has no effect in this version.
    """
    from flwr.supercore.superexec import run_superexec

    run_superexec.time = SimpleNamespace(sleep=sleep)  # all that the module uses of it


def use_supernode_sleep(sleep: Sleep) -> None:
    """Replace the pause of the SuperNode's loop between two polls for a message."""
    from flwr.supernode import start_client_internal

    start_client_internal.time = SimpleNamespace(sleep=sleep)  # all that the module uses of it


def use_installed_client_app(app: Callable[..., Message]) -> None:
    """Have ``flwr-clientapp`` call this app, and install nothing from a run's submitter."""
    from flwr.supernode.runtime import run_clientapp

    run_clientapp.install_from_fab = lambda *_, **__: Path()
    run_clientapp.get_project_dir = lambda *_: Path()
    run_clientapp.get_load_client_app_fn = lambda *_, **__: lambda *_: app


def show_server_app_output() -> None:
    """Have the SuperExec pass on the ServerApp's log output."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.plugin import AutoExecPlugin

    AutoExecPlugin.visible_output_task_types |= {TaskType.SERVER_APP}


def wrap_push_messages(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap the SuperLink's handler of messages that nodes send."""
    from flwr.superlink.servicer.fleet import fleet_handlers

    fleet_handlers.push_messages = wrap(fleet_handlers.push_messages)


def contain_malformed_replies() -> None:
    """Have Flower's Grid report a malformed reply as unavailable instead of raising.

    ``HttpGrid.pull_messages`` confirms each reply and then inflates it. A reply that cannot be
    inflated raises there, and the SuperLink does not hand out the other replies of that request
    again. Here each reply is inflated once before it is confirmed. A second call changes nothing.
    """
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        inflate_object_from_contents,
        pull_objects,
    )
    from flwr.superlink.grid import http_grid

    def pull(object_ids: list[str], *args: Any, **kwargs: Any) -> dict[str, bytes]:
        contents = pull_objects(object_ids, *args, **kwargs)
        message_id = object_ids[-1]  # children come first
        try:
            reply = inflate_object_from_contents(message_id, contents, keep_object_contents=True)
        except Exception as error:
            raise ObjectPullError(message_id, f"malformed ({type(error).__name__})") from None
        if not isinstance(reply, Message):
            raise ObjectPullError(message_id, "malformed (no message)")
        return contents

    http_grid.pull_objects = pull


def set_database_wait(milliseconds: int) -> None:
    """Set how long a request of the SuperLink waits for a locked database."""
    from flwr.supercore import sql_mixin

    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, ("busy_timeout", str(milliseconds)))

"""A ClientApp that answers at once, to measure the engine's own cost."""

import os
import time

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send the content back.

    The run config's fault = "die:N", "hang:N" or "raise:N" makes partition N misbehave; with "@2"
    appended, from the second message on.
    """
    what, _, rest = str(context.run_config.get("fault", "")).partition(":")
    where, _, since = rest.partition("@")
    guilty = where and int(where) == context.node_config["partition-id"]
    if guilty and (not since or "pid" in context.state):
        if what == "die":
            os._exit(9)
        if what == "hang":
            time.sleep(3600)
        raise ValueError("as asked")
    context.state["pid"] = ConfigRecord({"pid": os.getpid()})
    return Message(message.content, reply_to=message)

"""A ClientApp that a run brings along. No institution may ever run it."""

from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def take_over(message: Message, context: Context) -> Message:
    """Leave a mark."""
    Path("/state/taken-over").touch()
    return Message(RecordDict(), reply_to=message)

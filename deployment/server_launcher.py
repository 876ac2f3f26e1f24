"""The server's SuperExec: Flower's, except that what the ServerApp writes is seen."""

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.plugin import AutoExecPlugin

from fedlora import logs


def main() -> None:
    """Run it. Its arguments are Flower's."""
    logs.want()
    AutoExecPlugin.visible_output_task_types |= {TaskType.SERVER_APP}
    flower_superexec()


if __name__ == "__main__":
    main()

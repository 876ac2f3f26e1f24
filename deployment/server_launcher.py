"""The server's SuperExec: Flower's, with the ServerApp's output in its log."""

from flwr.supercore.cli.flower_superexec import flower_superexec

from fedlora import flower_internals, logs


def main() -> None:
    """Run the SuperExec with Flower's arguments."""
    logs.want()
    flower_internals.show_server_app_output()
    flower_superexec()


if __name__ == "__main__":
    main()

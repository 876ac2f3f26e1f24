"""The server's SuperExec: Flower's, except that what the ServerApp writes is seen."""

from flwr.supercore.cli.flower_superexec import flower_superexec

from fedlora import flower_internals, logs


def main() -> None:
    """Run it. Its arguments are Flower's."""
    logs.want()
    flower_internals.show_server_app_output()
    flower_superexec()


if __name__ == "__main__":
    main()

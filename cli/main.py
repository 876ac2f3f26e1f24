"""The command line. It loads a package's commands when one of them is called.

Exit codes: 0 done, 1 failed midway (finished work is kept), 2 bad input (nothing was written),
3 an audit refutes the promise, or a run's files do not match its privacy.json.
"""

import atexit
import functools
import gc
import importlib
import logging
import signal
import sys
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

import fedlora
from fedlora import logs
from fedlora.config import gone
from fedlora.startup import quiet_libraries
from fedlora.terminal import ERRORS

COMMANDS = {
    "init": "cli.check_commands",
    "check": "cli.check_commands",
    "run": "cli.simulation_commands",
    "sweep": "cli.experiment_commands",
    "report": "cli.experiment_commands",
    "verify": "cli.verify_command",
    "evaluate": "cli.simulation_commands",
    "predict": "cli.simulation_commands",
    "merge": "cli.simulation_commands",
    "config": "cli.simulation_commands",
    "plan": "cli.experiment_commands",
    "audit": "cli.experiment_commands",
    "ledger": "cli.ledger_commands",
    "service": "deployment.cli",
    "node": "deployment.cli",
    "home": "cli.home_command",
    "deploy": "deployment.cli",
}
"""Each command and its module, in the order of the help page."""
atexit.register(gc.freeze)  # skips a second of garbage collection at exit


class Commands(TyperGroup):
    """The root group. It imports a command's module when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command, or return None for an unknown name; one that is gone ends the process."""
        if cmd_name in gone.COMMANDS:
            ERRORS.write_line(f"error: {cmd_name} is gone; {gone.COMMANDS[cmd_name]}")
            raise typer.Exit(2)
        if cmd_name not in COMMANDS:
            return None
        room: typer.Typer = importlib.import_module(COMMANDS[cmd_name]).app
        return typer.main.get_group(room).commands[cmd_name]


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated LoRA under differential privacy, "
    "for institutions that may not share their data.",
)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Federated LoRA under differential privacy."""
    # SIGTERM and a lost terminal end a command as Ctrl-C does. Services have their own handlers.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if (before := signal.getsignal(number)) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
            context.call_on_close(functools.partial(signal.signal, number, before))
    quiet_libraries()
    if logging.lastResort is not None:  # the handler of warnings where no log is kept
        logging.lastResort.setFormatter(logs.OneLine("%(message)s"))
    if version:
        print(fedlora.__version__)
        raise typer.Exit


if __name__ == "__main__":
    sys.exit(app())

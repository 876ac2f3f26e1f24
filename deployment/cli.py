"""``fedlora node | service | deploy``: a deployment's services and its operator's commands."""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from deployment import service
from deployment.errors import FlowerError, in_words
from fedlora.config import gone
from fedlora.errors import InputError
from fedlora.terminal import ERRORS, Json, Overrides, Terminal, clean_errors

if TYPE_CHECKING:
    from deployment.submissions import Submission


class _Commands(TyperGroup):
    """The operator's commands; one that is gone answers with what to use."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if use := gone.COMMANDS.get(f"deploy {cmd_name}"):
            ERRORS.write_line(f"error: deploy {cmd_name} is gone; {use}")
            raise typer.Exit(2)
        return super().get_command(ctx, cmd_name)


app = typer.Typer()
deploy = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help="A federation on separate machines (docs/deployment.md).",
)
app.add_typer(deploy, name="deploy")
PLAIN = Terminal()
UNKNOWN = 4
"""Exit code: a file or the SuperLink failed, which says nothing about a run."""


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn bad input, and an error of a file or the SuperLink, into one line and an exit code."""

    @clean_errors
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader of the output has ended
            raise
        except (FlowerError, OSError) as error:
            ERRORS.write_line(f"error: {in_words(error)}")
            raise typer.Exit(UNKNOWN) from None

    return wrapped


@app.command("service", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_one_line_errors
def run_service(
    name: Annotated[str, typer.Argument(help="The service's name in its log.")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.")],
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Pass on lines of JSON unchanged.")
    ] = False,
) -> None:
    """Run a command; each line that it writes becomes one line of JSON."""
    raise typer.Exit(service.run(name, [command], ready=json_lines))


@app.command("node")
@_one_line_errors
def run_node(
    settings: Annotated[Path, typer.Argument(help="The institution's settings, a TOML file.")],
    healthy: Annotated[
        bool, typer.Option("--healthy", help="Only report by the exit code whether the node runs.")
    ] = False,
    forget: Annotated[
        str, typer.Option(help="Only erase the secrets of this run, which ended without this node.")
    ] = "",
) -> None:
    """Run an institution, which answers the federation with its own installed app."""
    from client.settings import absolute, load
    from deployment import node

    path = absolute(settings)
    loaded = load(str(path))
    if healthy:
        raise typer.Exit(0 if node.is_running(loaded) else 1)
    if forget:
        PLAIN.write_line(node.forget(loaded, forget))
        return
    node.check(loaded)
    with node.running(loaded) as private:
        code = service.run(
            loaded.name,
            node.commands(loaded, path, private),
            node.environment(private, os.environ),
        )
    raise typer.Exit(code)


@deploy.command()
@_one_line_errors
def init(
    directory: Annotated[Path, typer.Argument(help="Directory to create, or of an earlier init.")],
    institutions: Annotated[
        str, typer.Option(help="Names of the new institutions, joined by commas.")
    ] = "",
    host: Annotated[
        str, typer.Option(help="Name or address under which institutions reach the gateway.")
    ] = "",
    port: Annotated[int, typer.Option(help="Port on which the gateway is published.")] = 8443,
) -> None:
    """Make CA, certificates, keys and settings of a federation; add institutions, renew."""
    from deployment import setup

    names = [name.strip() for name in institutions.split(",") if name.strip()]
    if not names and not directory.exists():
        raise InputError("--institutions is empty; give one or more names, joined by commas")
    setup.make(directory, names, host=host, port=port)
    PLAIN.write_line(
        f"{directory} is ready. Next: records and ledgers (docs/deployment.md), then docker "
        f"compose --env-file {directory}/.env up --detach --wait"
    )


@deploy.command("check")
@_one_line_errors
def run_checks(
    target: Annotated[
        str,
        typer.Argument(
            help="The operator's directory, an institution's settings, or an https address."
        ),
    ],
    ca: Annotated[
        Path, typer.Option(help="The certificate of the CA that signed the service's.")
    ] = Path("ca.crt"),
    as_json: Json = False,
) -> None:
    """Check a set-up or a running service; exit code 1 if a check fails."""
    from deployment import check

    if target.startswith("https://"):
        found = check.service(target, ca)
    else:
        found = (check.operator if Path(target).is_dir() else check.institution)(Path(target))
    if as_json:
        print(json.dumps({"ok": check.passed(found), "checks": [vars(one) for one in found]}))
    else:
        for one in found:
            PLAIN.write_line(f"{one.outcome:5} {one.name:22} {one.details}")
    if not check.passed(found):
        raise typer.Exit(1)


@deploy.command()
@_one_line_errors
def submit(
    config: Annotated[Path, typer.Argument(help="A TOML file with data.source institutions.")],
    assign: Overrides = None,
    name: Annotated[
        str,
        typer.Option(
            help="Name of the submission; that of a failed or stopped one continues it. By default "
            "the file's name and the time."
        ),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run, or continue one. With --wait the exit code is 0 only if it has a result."""
    from deployment import submissions, superlink_client
    from fedlora.config.config import load, parse_overrides

    resolved = load(config, parse_overrides(assign or []))
    here = superlink_client.server()
    chosen = name or f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    submission = submissions.submit(here, resolved, chosen)
    if wait:
        submission = submissions.follow(
            here,
            chosen,
            lambda record: None if as_json else PLAIN.write_line(_round(record, resolved)),
            after=submission.rounds,
        )
    _show([submission], as_json=as_json)
    if wait and submission.state != "completed":
        raise typer.Exit(1)


@deploy.command("list")
@_one_line_errors
def list_submissions(as_json: Json = False) -> None:
    """Show the state of all runs; exit code 4 if one of them is unknown."""
    from deployment import submissions, superlink_client

    here = superlink_client.server()
    shown: list[Submission] = []
    names = submissions.names(here)
    for name in names:
        try:
            shown.append(submissions.observe(here, name))
        except (FlowerError, OSError, InputError) as error:
            ERRORS.write_line(f"error: {name}: {in_words(error)}")
    _show(shown, as_json=as_json)
    if len(shown) < len(names):
        raise typer.Exit(UNKNOWN)


@deploy.command()
@_one_line_errors
def stop(name: Annotated[str, typer.Argument(help="A submission's name.")]) -> None:
    """Stop a run; its finished rounds are kept."""
    from deployment import submissions, superlink_client

    _show([submissions.stop(superlink_client.server(), name)], as_json=False)


def _round(record: dict[str, Any], config: Any) -> str:
    accuracy = record["metrics"].get("accuracy")
    return (
        f"round {record['round']} of {config.federation.rounds}: {record['updates']} of "
        f"{record['asked']} updates, {record['seconds']:.1f} s"
        + (f", accuracy {accuracy:.4f}" if accuracy is not None else "")
        + "".join(f"; {n}: {reason}" for n, reason in record["aggregation"]["rejected"].items())
    )


def _show(submissions: "list[Submission]", *, as_json: bool) -> None:
    if as_json:
        keys = ("name", "state", "details", "runs")
        said = [
            {**{key: getattr(one, key) for key in keys}, "run_dir": str(one.directory)}
            for one in submissions
        ]
        print(json.dumps({"submissions": said}))
        return
    for one in submissions:
        PLAIN.write_line(f"{one.name}: {one.state}" + (f": {one.details}" if one.details else ""))

"""``fedlora node | service | deploy``: the services of a deployment and what its operator does."""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.deploy import service as services
from experiments.terminal import Terminal
from fedlora import config as configuration
from fedlora import logs
from fedlora.errors import InputError

app = typer.Typer(
    no_args_is_help=True, help="A federation on machines of its own (docs/deployment.md)."
)
log = logging.getLogger("fedlora.server")
PLAIN = Terminal()
ERRORS = Terminal(stderr=True)
STILL_RUNNING = 3
AWAY = 4
"""The SuperLink did not do what it was asked, so nothing is known of a run."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Name = Annotated[str, typer.Argument(help="A submission's name.")]
Directory = Annotated[Path, typer.Argument(help="The directory that `deploy init` made.")]


def add_to(main: typer.Typer, clean: Callable[[Any], Any]) -> None:
    """Register these commands; ``clean`` turns errors into one line and an exit code."""
    main.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(clean(service))
    main.command()(clean(node))
    commands: list[Callable[..., None]] = [init, add, renew, server]
    commands += [_asks(command) for command in (register, submit, status, stop, results)]
    commands += [reachable, check]
    for command in commands:
        app.command()(clean(command))
    app.command(hidden=True)(clean(keep))
    main.add_typer(app, name="deploy")


def _asks(command: Callable[..., None]) -> Callable[..., None]:
    """What the SuperLink does not do is one line on stderr and an exit code of its own."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from experiments.deploy.flower import FlowerError

        try:
            command(*args, **kwargs)
        except FlowerError as error:
            ERRORS.line(f"error: {error}")
            raise typer.Exit(AWAY) from None

    return wrapped


def service(
    name: Annotated[str, typer.Argument(help="The service's name in its log.")],
    command: Annotated[list[str], typer.Argument(help="After --: what to run.")],
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Take its lines of JSON as they are.")
    ] = False,
) -> None:
    """Run a command; each line that it writes becomes one line of JSON."""
    raise typer.Exit(services.run(name, [command], ready=json_lines))


def node(
    settings: Annotated[Path, typer.Argument(help="The institution's settings, a TOML file.")],
    healthy: Annotated[
        bool, typer.Option("--healthy", help="Only say, by the exit code, whether it runs.")
    ] = False,
) -> None:
    """Run an institution: it answers the federation with its own installed app."""
    from client import node as nodes
    from client import settings as own

    path = settings.absolute()
    loaded = own.load(str(path))
    if healthy:
        raise typer.Exit(0 if nodes.healthy(loaded) else 1)
    nodes.check(loaded)
    with nodes.running(loaded) as private:
        code = services.run(
            loaded.name,
            nodes.commands(loaded, path, private),
            {"FLWR_HOME": str(private), "TMPDIR": str(private)},
            last_words=nodes.GAVE_UP,
        )
    raise typer.Exit(code)


def init(
    directory: Annotated[Path, typer.Argument(help="Directory to make; it must not exist.")],
    institutions: Annotated[str, typer.Option(help="Their names, joined by commas.")],
    host: Annotated[
        str, typer.Option(help="Name or address under which institutions reach the gateway.")
    ] = "localhost",
    port: Annotated[int, typer.Option(help="On which the gateway is published.")] = 8443,
) -> None:
    """Make CA, certificates, keys, secrets and settings of a federation."""
    from experiments.deploy import init as making

    names = [name.strip() for name in institutions.split(",") if name.strip()]
    if not names:
        raise InputError("--institutions is empty; give one or more names, joined by commas")
    making.make(directory, names, host=host, port=port)
    PLAIN.line(
        f"{directory} has the keys of {len(names)} institutions. Next: their records and ledgers "
        f"(docs/deployment.md), then docker compose --env-file {directory}/.env up --detach --wait"
    )


def add(
    directory: Directory, name: Annotated[str, typer.Argument(help="The new institution.")]
) -> None:
    """Add an institution: its folder, its keys, its public key at the server."""
    from experiments.deploy import init as making

    making.add(directory, name)
    PLAIN.line(f"{directory / 'institutions' / name} is what {name} gets")


def renew(
    directory: Directory,
    host: Annotated[
        str, typer.Option(help="Where institutions reach the gateway, if that has changed.")
    ] = "",
) -> None:
    """New certificates of gateway and SuperLink, valid for another year, for the same names."""
    from experiments.deploy import init as making

    making.renew(directory, host=host)
    PLAIN.line("restart gateway and superlink for them to be used")


def server() -> None:
    """Run the server: registers institutions, runs the ServerApp, continues what was cut off."""
    from experiments.deploy import flower

    here = flower.server()
    flower.connect(here)
    superexec = [
        *(sys.executable, "-P", "-m", "server.launcher"),
        *("--runtime-api-address", here.superlink, "--root-certificates", str(here.ca)),
        *("--superexec-auth-secret-file", str(here.secret)),
    ]
    keeper = [sys.executable, "-P", "-m", "experiments.cli", "deploy", "keep"]
    keeper += ["--since", str(time.monotonic())]  # before the first ServerApp can run
    raise typer.Exit(services.run("server", [superexec, keeper]))


def keep(
    since: Annotated[float, typer.Option(help="When the server was started (monotonic clock).")],
) -> None:
    """Register institutions, also new ones, and start cut-off runs again."""
    from experiments.deploy import flower, runs

    logs.to_stderr()
    here = flower.server()
    registered = None
    while True:
        try:
            if (files := flower.key_files(here)) != registered:
                for name, outcome in flower.register(here).items():
                    log.info("institution %s: %s", name, outcome)
                registered = files
            for line in runs.proceed(here, since=since):
                log.info("%s", line)
        except flower.FlowerError as error:  # the SuperLink may be away for a while
            log.warning("%s", error)
        time.sleep(runs.ASK_SECONDS)


def register() -> None:
    """Register the public keys of the institutions at the SuperLink."""
    from experiments.deploy import flower

    here = flower.server()
    flower.connect(here)
    outcomes = flower.register(here)
    for name, outcome in outcomes.items():
        PLAIN.line(f"{name}: {outcome}")
    if not outcomes:
        raise InputError(f"{here.institutions} has no public key NAME.pub; put one there")
    if not set(outcomes.values()) <= {"registered", "already registered"}:
        raise typer.Exit(1)


def reachable(
    url: Annotated[str, typer.Argument(help="An https address.")],
    ca: Annotated[Path, typer.Option(help="The CA certificate that must have signed it.")],
) -> None:
    """Say by the exit code whether a service answers under a valid certificate."""
    from experiments.deploy import check as checks

    problem, _ = checks.ask(url, ca, seconds=4.0)
    if problem:
        PLAIN.line(problem)
        raise typer.Exit(1)


def submit(
    config: Annotated[Path, typer.Argument(help="A TOML file with data.source institutions.")],
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE; wins over the file.")
    ] = None,
    name: Annotated[str, typer.Option(help="By default the file's name and the time.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run. With --wait the exit code is 0 only when it has a result."""
    from experiments.deploy import flower, runs

    resolved = configuration.load(config, configuration.parse_overrides(assign or []))
    here = flower.server()
    flower.connect(here)
    chosen = name or f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        submission = runs.submit(here, resolved, chosen)
    except flower.Unanswered as error:
        raise flower.FlowerError(
            f"{error}. {chosen} is kept, and the server starts it unless it has begun: "
            f"`fedlora deploy status {chosen}`, or `stop {chosen}`"
        ) from None
    if not as_json:
        PLAIN.line(f"{chosen}: submitted; results in {submission.directory}")
    if wait:
        rounds = resolved.federation.rounds
        submission = runs.follow(
            here, chosen, lambda record: None if as_json else PLAIN.line(_round(record, rounds))
        )
    _show(submission, as_json)
    if wait and submission.state != "completed":
        raise typer.Exit(1)


def status(
    name: Annotated[str, typer.Argument(help="A submission's name; without one, all.")] = "",
    as_json: Json = False,
) -> None:
    """What became of a run: exit code 0 completed, 1 failed or stopped, 3 not at its end.

    Without a name it is 0 whatever became of them.
    """
    from experiments.deploy import flower, runs

    here = flower.server()
    flower.connect(here)
    if not name:
        for one in runs.every(here):
            _show(runs.observe(here, one.name), as_json)
        return
    submission = runs.observe(here, name)
    _show(submission, as_json)
    if submission.state != "completed":
        raise typer.Exit(STILL_RUNNING if submission.state == "running" else 1)


def stop(name: Name) -> None:
    """Stop a run; its finished rounds are kept."""
    from experiments.deploy import flower, runs

    here = flower.server()
    flower.connect(here)
    _show(runs.stop(here, name), False)


def results(name: Name, as_json: Json = False) -> None:
    """A completed run's result; exit code 1 when there is none."""
    from experiments.deploy import flower, runs

    here = flower.server()
    flower.connect(here)
    submission = runs.observe(here, name)
    if submission.state != "completed":
        _show(submission, as_json)
        raise typer.Exit(1)
    result = json.loads((submission.directory / "result.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if not isinstance(value, dict | list):
            PLAIN.line(f"{key:20} {value}")
    PLAIN.line(f"{'adapter':20} {submission.directory / 'adapter'}")


def check(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="At the operator's: what `deploy init` made.")
    ] = None,
    institution: Annotated[
        Path | None, typer.Option(help="At an institution: its settings, a TOML file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong before anything runs; exit code 1 if something is."""
    from experiments.deploy import check as checks

    if (directory is None) == (institution is None):
        raise InputError("give either --dir DIR (operator) or --institution SETTINGS.toml")
    found = (
        checks.operator(directory)
        if directory is not None
        else checks.institution(institution.absolute() if institution else Path())
    )
    if as_json:
        print(json.dumps({"ok": checks.ok(found), "checks": [vars(one) for one in found]}))
    else:
        for one in found:
            PLAIN.line(f"{one.outcome:5} {one.name:22} {one.details}")
    if not checks.ok(found):
        raise typer.Exit(1)


def _round(record: dict[str, Any], rounds: int) -> str:
    rejected: dict[str, str] = record["aggregation"]["rejected"]
    accuracy = record["metrics"].get("accuracy")
    return (
        f"round {record['round']} of {rounds}: {record['updates']} of {record['asked']} updates, "
        f"{record['seconds']:.1f} s"
        + (f", accuracy {accuracy:.4f}" if accuracy is not None else "")
        + "".join(f"; {name}: {reason}" for name, reason in rejected.items())
    )


def _show(submission: Any, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {
                    "name": submission.name,
                    "state": submission.state,
                    "details": submission.details,
                    "run_dir": str(submission.directory),
                    "flower_runs": submission.runs,
                }
            )
        )
    else:
        details = f": {submission.details}" if submission.details else ""
        PLAIN.line(f"{submission.name}: {submission.state}{details}")

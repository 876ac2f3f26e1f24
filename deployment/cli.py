"""``fedlora node | service | deploy``: a deployment's services and its operator's commands."""

import functools
import json
import logging
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from deployment import service
from deployment.errors import FlowerError, Unanswered, in_words
from fedlora import logs
from fedlora.errors import InputError
from fedlora.terminal import ERRORS, Json, Overrides, Terminal, clean_errors

app = typer.Typer()
deploy = typer.Typer(
    no_args_is_help=True, help="A federation on separate machines (docs/deployment.md)."
)
app.add_typer(deploy, name="deploy")
log = logging.getLogger("fedlora.server")
PLAIN = Terminal()
STILL_RUNNING = 3
"""Exit code of `status`: the run has not ended."""
UNKNOWN = 4
"""Exit code: a file or the SuperLink failed, which says nothing about a run."""

Name = Annotated[str, typer.Argument(help="A submission's name.")]
Directory = Annotated[Path, typer.Argument(help="The directory that `deploy init` made.")]


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
) -> None:
    """Run an institution, which answers the federation with its own installed app."""
    from client.settings import absolute, load
    from deployment import node

    path = absolute(settings)
    loaded = load(str(path))
    if healthy:
        raise typer.Exit(0 if node.is_running(loaded) else 1)
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
    directory: Annotated[Path, typer.Argument(help="Directory to create; it must not exist.")],
    institutions: Annotated[str, typer.Option(help="Names of the institutions, joined by commas.")],
    host: Annotated[
        str, typer.Option(help="Name or address under which institutions reach the gateway.")
    ] = "localhost",
    port: Annotated[int, typer.Option(help="Port on which the gateway is published.")] = 8443,
) -> None:
    """Make CA, certificates, keys, secrets and settings of a federation."""
    from deployment import setup

    names = [name.strip() for name in institutions.split(",") if name.strip()]
    if not names:
        raise InputError("--institutions is empty; give one or more names, joined by commas")
    setup.make(directory, names, host=host, port=port)
    PLAIN.write_line(
        f"{directory} has the keys of {len(names)} institutions. Next: records and ledgers "
        f"(docs/deployment.md), then docker compose --env-file {directory}/.env up --detach --wait"
    )


@deploy.command()
@_one_line_errors
def add(
    directory: Directory, name: Annotated[str, typer.Argument(help="The new institution.")]
) -> None:
    """Add an institution: its folder, its keys, and its public key at the server."""
    from deployment import setup

    setup.add(directory, name)
    PLAIN.write_line(
        f"{directory / 'institutions' / name} is for {name}. Under Compose on this host, add its "
        "service and network to docker-compose.yml (docs/deployment.md, 'Adding')"
    )


@deploy.command()
@_one_line_errors
def renew(
    directory: Directory,
    host: Annotated[
        str,
        typer.Option(help="Host under which institutions reach the gateway, if it has changed."),
    ] = "",
) -> None:
    """Renew the certificates of gateway and SuperLink for another year, with the same names."""
    from deployment import setup

    setup.renew(directory, host=host)
    PLAIN.write_line("restart gateway and superlink to use the new certificates")


@deploy.command()
@_one_line_errors
def server() -> None:
    """Run the server: register institutions, run the ServerApp, continue interrupted runs."""
    from deployment import superlink_client

    here = superlink_client.server()
    superlink_client.connect(here)
    os.environ["TMPDIR"] = str(here.scratch())
    superexec = [
        *(sys.executable, "-P", "-m", "deployment.server_launcher"),
        *(here.superlink, str(here.ca), str(here.secret)),
    ]
    keeper = [sys.executable, "-P", "-m", "cli.main", "deploy", "keep"]
    keeper += ["--since", str(time.monotonic())]  # before the first ServerApp can run
    raise typer.Exit(service.run("server", [superexec, keeper]))


@deploy.command(hidden=True)
@_one_line_errors
def keep(
    since: Annotated[float, typer.Option(help="When the server was started (monotonic clock).")],
) -> None:
    """Register institutions, also new ones, and restart interrupted runs."""
    from deployment import superlink_client
    from deployment.keeper import Keeper

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `service.run` reports which signal ended it
    logs.to_stderr()
    Keeper(superlink_client.server(), since).keep()


@deploy.command()
@_one_line_errors
def register() -> None:
    """Register the public keys of the institutions at the SuperLink."""
    from deployment import superlink_client

    here = superlink_client.server()
    outcomes = superlink_client.register(here)
    for name, outcome in outcomes.items():
        PLAIN.write_line(f"{name}: {outcome}")
    if not outcomes:
        raise InputError(f"{here.institutions} has no public key NAME.pub; put one there")
    if not set(outcomes.values()) <= set(superlink_client.REGISTERED):
        raise typer.Exit(1)


@deploy.command()
@_one_line_errors
def reachable(
    url: Annotated[str, typer.Argument(help="An https address.")],
    ca: Annotated[
        Path,
        typer.Option(
            help="The certificate of the CA that must have signed the service's certificate."
        ),
    ],
) -> None:
    """Report by the exit code whether a service answers under a valid certificate."""
    from deployment import check

    problem, _ = check.get(url, ca, seconds=4.0)
    if problem:
        PLAIN.write_line(problem)
        raise typer.Exit(1)


@deploy.command()
@_one_line_errors
def submit(
    config: Annotated[Path, typer.Argument(help="A TOML file with data.source institutions.")],
    assign: Overrides = None,
    name: Annotated[
        str, typer.Option(help="Name of the submission; by default the file's name and the time.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a run. With --wait the exit code is 0 only when the run has a result."""
    from deployment import submissions, superlink_client
    from fedlora.config.config import load, parse_overrides

    resolved = load(config, parse_overrides(assign or []))
    here = superlink_client.server()
    chosen = name or f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        submission = submissions.submit(here, resolved, chosen)
    except Unanswered as error:
        raise FlowerError(
            f"{error}. {chosen} is kept, and the server starts it unless it has begun: "
            f"`fedlora deploy status {chosen}`, or `stop {chosen}`"
        ) from None
    if not as_json:
        PLAIN.write_line(f"{chosen}: submitted; results in {submission.directory}")
    _started(here, submission, wait=wait, as_json=as_json)


@deploy.command()
@_one_line_errors
def resume(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    as_json: Json = False,
) -> None:
    """Continue a failed or stopped run after its last finished round. Exit codes as of `submit`."""
    from deployment import submissions, superlink_client

    here = superlink_client.server()
    try:
        submission = submissions.resume(here, name)
    except Unanswered as error:
        raise FlowerError(
            f"{error}. The server starts {name} unless it has begun: "
            f"`fedlora deploy status {name}`, or `stop {name}`"
        ) from None
    if not as_json:
        PLAIN.write_line(f"{name}: continues after round {submission.rounds}")
    _started(here, submission, wait=wait, as_json=as_json)


@deploy.command()
@_one_line_errors
def status(
    name: Annotated[
        str, typer.Argument(help="A submission's name; without it, all submissions.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Show the state of a run: exit code 0 completed, 1 failed or stopped, 3 not ended yet.

    Without a name the exit code is 0 for any states, and 4 if one of them is unknown.
    """
    from deployment import submissions, superlink_client

    here = superlink_client.server()
    if not name:
        unknown, shown = False, list[dict[str, Any]]()
        for one in submissions.names(here):
            try:
                submission = submissions.observe(here, one)
            except (FlowerError, OSError, InputError) as error:
                ERRORS.write_line(f"error: {one}: {in_words(error)}")
                unknown = True
            else:
                shown.append(_described(submission))
                if not as_json:
                    _show(submission, as_json)
        if as_json:
            print(json.dumps({"submissions": shown}))
        if unknown:
            raise typer.Exit(UNKNOWN)
        return
    submission = submissions.observe(here, name)
    _show(submission, as_json)
    if submission.state != "completed":
        raise typer.Exit(STILL_RUNNING if submission.state == "running" else 1)


@deploy.command()
@_one_line_errors
def stop(name: Name) -> None:
    """Stop a run; its finished rounds are kept."""
    from deployment import submissions, superlink_client

    here = superlink_client.server()
    _show(submissions.stop(here, name), False)


@deploy.command()
@_one_line_errors
def results(name: Name, as_json: Json = False) -> None:
    """Show the result of a completed run; exit code 1 without a result."""
    from deployment import submissions, superlink_client

    here = superlink_client.server()
    submission = submissions.observe(here, name)
    if submission.state != "completed":
        _show(submission, as_json)
        raise typer.Exit(1)
    result = submission.result()
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if not isinstance(value, dict | list):
            PLAIN.write_line(f"{key:20} {'not known' if value is None else value}")
    PLAIN.write_line(f"{'adapter':20} {submission.directory / 'adapter'}")
    for institution, outcome in result.get("released", {}).items():
        if outcome != "stored":
            PLAIN.write_line(f"{'hand the adapter to':20} {institution} ({outcome})")


@deploy.command("check")
@_one_line_errors
def run_checks(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="At the operator: the directory of `deploy init`.")
    ] = None,
    institution: Annotated[
        Path | None, typer.Option(help="At an institution: its settings, a TOML file.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 at a warning too, as for a monitor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the set-up before anything runs; exit code 1 if a check fails."""
    from deployment import check

    if (directory is None) == (institution is None):
        raise InputError("give either --dir DIR (operator) or --institution SETTINGS.toml")
    found = (
        check.operator(directory)
        if directory is not None
        else check.institution(institution or Path())
    )
    if as_json:
        print(json.dumps({"ok": check.passed(found), "checks": [vars(one) for one in found]}))
    else:
        for one in found:
            PLAIN.write_line(f"{one.outcome:5} {one.name:22} {one.details}")
    if not check.passed(found) or (strict and any(one.outcome == "warn" for one in found)):
        raise typer.Exit(1)


@deploy.command()
@_one_line_errors
def fingerprint(
    settings: Annotated[Path, typer.Argument(help="The institution's settings, a TOML file.")],
    as_json: Json = False,
) -> None:
    """Show the fingerprints of the own key and the peers' keys, to compare by telephone.

    Each institution reads its own out, and its peers compare it with what they have. The operator's
    word is not enough: the keys decide who takes part in secure aggregation.
    """
    from client.settings import absolute, load
    from fedlora.secure import peers

    own = load(str(absolute(settings)))
    for name in ("key", "peers"):
        if not getattr(own, name):
            raise InputError(f"{name} is missing from the institution's settings; add it")
    keys = peers.pinned(Path(own.peers), own.name, peers.read_private(Path(own.key)))
    found = {
        name: peers.fingerprint(keys[name]) for name in (own.name, *sorted({*keys} - {own.name}))
    }
    if as_json:
        print(json.dumps({"own": own.name, "fingerprints": found}))
        return
    for name, digits in found.items():
        PLAIN.write_line(f"{name}{' (own)' if name == own.name else ''}")
        for line in textwrap.wrap(digits, width=len(digits) // 2 + 1):
            PLAIN.write_line(f"  {line}")


@deploy.command()
@_one_line_errors
def forget(
    settings: Annotated[Path, typer.Argument(help="The institution's settings, a TOML file.")],
    run: Annotated[str, typer.Option(help="The run's identity; another one lists those known.")],
) -> None:
    """Erase an institution's secrets of a run under secure aggregation that ended without it.

    At the end of a run an institution erases them by itself. If the run failed or was stopped, or
    the institution was offline then, they stay until this command. The run cannot go on here.
    """
    from client import secure_role, secure_store
    from client.settings import absolute, load

    own = load(str(absolute(settings)))
    store = Path(own.state) / secure_store.FILE
    known: dict[str, bool] = {}
    if store.exists():
        with secure_store.opened(store) as db:
            known = secure_store.known(db)
    if run not in known:
        left = [name for name, ended in known.items() if not ended]
        raise InputError(
            f"--run is {run!r}, but {store} has no such run; it has secrets of: "
            f"{', '.join(left) or 'none'}"
        )
    charged = secure_role.erase(store, Path(own.ledger), run)
    PLAIN.write_line(f"erased the secrets of run {run}; it cannot go on here")
    if not charged:
        PLAIN.write_line(
            f"warning: the ledger {own.ledger} has no charge of this run. If the settings named "
            "another ledger then, that one keeps the key of the last round's noise: name it in "
            "settings and run this command once more"
        )


def _started(here: Any, submission: Any, *, wait: bool, as_json: bool) -> None:
    """Show a started submission, at its end with ``wait``: then exit 1 without a result."""
    from deployment import submissions

    if wait:
        rounds = submission.config["federation.rounds"]
        submission = submissions.follow(
            here,
            submission.name,
            lambda record: None if as_json else PLAIN.write_line(_round(record, rounds)),
            after=submission.rounds,
        )
    _show(submission, as_json)
    if wait and submission.state != "completed":
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


def _described(submission: Any) -> dict[str, Any]:
    return {
        "name": submission.name,
        "state": submission.state,
        "details": submission.details,
        "run_dir": str(submission.directory),
        "flower_runs": submission.runs,
    }


def _show(submission: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_described(submission)))
    else:
        details = f": {submission.details}" if submission.details else ""
        PLAIN.write_line(f"{submission.name}: {submission.state}{details}")

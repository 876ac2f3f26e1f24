"""Checks of a set-up before anything runs, at the operator's and at an institution."""

import email.utils
import http.client
import importlib.metadata
import json
import math
import os
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryptography import x509

import fedlora
from deployment import keys, setup
from deployment.errors import in_words
from fedlora import files
from fedlora.config.sections import check_gpu
from fedlora.errors import InputError, Refusal
from fedlora.rounding import at_most
from fedlora.runs import seal
from fedlora.secure import noise_shares, peers

if TYPE_CHECKING:
    from client.ledger import Ledger
    from client.settings import Settings
    from fedlora.data.shards import Shard

MIN_DAYS_LEFT = 30
MAX_SECONDS_AHEAD = 4.0
"""Flower refuses signatures 5 s ahead of its clock; an HTTP date is rounded down by up to 1 s."""
MAX_SECONDS_BEHIND = 60.0
"""Flower accepts signatures up to 305 s behind its clock."""
GROUP_AND_OTHERS = 0o077
GROUP_AND_OTHERS_WRITE = 0o022
Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    outcome: Outcome
    details: str


NO_HELD_OUT = Check(
    "held-out records",
    "warn",
    "the settings have no test-source, so `fedlora home` cannot tell whether joining paid: set it "
    "to a file of rows that no run trains on",
)


def passed(checks: list[Check]) -> bool:
    """Whether no check failed."""
    return all(check.outcome != "fail" for check in checks)


def get(url: str, ca: Path, seconds: float = 10.0) -> tuple[str, dict[str, Any]]:
    """Get an https address.

    Args:
        url: The address.
        ca: The certificate of the only accepted CA.
        seconds: The timeout.

    Returns:
        The problem, or ``""``; and the answer's HTTP ``date`` and JSON ``body``.
    """
    if not url.startswith("https://"):
        raise InputError(f"{url!r} is no https address; write https://HOST:PORT/health")
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"{ca} is not a CA certificate: {error}; give that of the federation"
        ) from None
    try:
        with urllib.request.urlopen(url, timeout=seconds, context=context) as response:
            body, date = response.read(4096), response.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}", {}
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return f"{url} has a certificate that is not accepted: {reason.verify_message}", {}
        return f"{url} does not answer: {reason}", {}
    try:
        said = json.loads(body)
    except ValueError:
        said = {}
    return "", {"date": date, "body": said if isinstance(said, dict) else {}}


def operator(directory: Path) -> list[Check]:
    """Check the operator's directory, which ``fedlora deploy init`` made."""
    ca = directory / "gateway" / "ca.crt"  # ca/ may be on another machine
    if not ca.is_file():
        raise InputError(
            f"{directory} has no gateway/ca.crt; give the directory of `fedlora deploy init`"
        )
    try:
        user = setup.owner(directory)[0] if os.geteuid() == 0 else None
    except InputError as error:
        return [Check("services' user", "fail", str(error))]
    new_ca = "make a new federation with `fedlora deploy init`, and give its ca.crt to all"
    found = [_certificate("CA certificate", ca, new_ca)]
    for name, pem, key in (
        *(
            (name, directory / name / "server.pem", "server.key")
            for name in ("gateway", "superlink")
        ),
        ("statement", directory / "server" / "keys" / seal.CERTIFICATE, seal.KEY),
    ):
        found += [
            _certificate(f"{name} certificate", pem),
            _signed(f"{name} signed by the CA", pem, ca),
            _private(f"{name} key", pem.with_name(key), user),
            _belongs(f"{name} key fits", pem.with_name(key), pem, "`fedlora deploy renew`"),
        ]
    if (key := directory / "ca" / "ca.key").exists():
        found += [
            _private("CA key", key),
            _belongs("CA key fits", key, ca, f"restore {key} from its copy"),
        ]
    found += [
        _private("SuperExec secret", directory / "superlink" / "superexec.secret", user),
        _private("server's secret", directory / "server" / "keys" / "superexec.secret", user),
        _equal(
            "secrets agree",
            directory / "superlink" / "superexec.secret",
            directory / "server" / "keys" / "superexec.secret",
        ),
    ]
    found += [_folders(directory), _institutions(directory / "server" / "institutions")]
    for folder in sorted((directory / "institutions").glob("*")):
        key = folder / "keys" / "node.key"
        if key.exists():
            found.append(_private(f"{folder.name}: key", key, user))
            public = directory / "server" / "institutions" / f"{folder.name}.pub"
            found.append(_pair(f"{folder.name}: public key", key, public))
    return found + _flower()


def _folders(directory: Path) -> Check:
    """Check that nobody but their owner may put files into the folders of keys."""
    wanted = ("ca", "gateway", "superlink", "server/keys", "server/institutions")
    folders = [directory / name for name in wanted]
    folders += sorted(directory.glob("institutions/*/keys")) + sorted(
        directory.glob("institutions/*/keys/peers")
    )
    there = [folder for folder in folders if folder.is_dir()]
    for folder in there:
        if (mode := folder.stat().st_mode) & GROUP_AND_OTHERS_WRITE:
            return Check(
                "folders of keys",
                "fail",
                f"{folder} may be written by others than its owner (mode {mode & 0o777:o}), who "
                f"could replace the keys in it; chmod go-w {folder}",
            )
    return Check("folders of keys", "ok", f"{len(there)} folders")


def _institutions(folder: Path) -> Check:
    """Check the institutions' public keys and sizes as their registration will."""
    holders: dict[str, str] = {}
    for file in sorted(folder.glob("*.pub")):
        try:
            key = peers.fingerprint(peers.read(file.read_bytes(), file))
            if (stated := file.with_suffix(".size")).exists():
                keys.stated_size(stated)
        except (OSError, ValueError) as error:
            return Check("institutions", "fail", in_words(error))
        if (holder := holders.setdefault(key, file.stem)) != file.stem:
            return Check(
                "institutions",
                "fail",
                f"{file} is the key of {holder}; ask {file.stem} for its own",
            )
    names = ", ".join(holders.values())
    return Check("institutions", "ok" if names else "fail", names or "none")


def institution(path: Path) -> list[Check]:
    """Check an institution by its settings."""
    from client import settings

    path = settings.absolute(path)
    try:
        own = settings.load(str(path))
    except InputError as error:
        return [Check("settings", "fail", str(error))]
    found = [Check("settings", "ok", str(path))]
    ca = Path(own.ca)
    new_ca = "ask the operator for the federation's ca.crt"
    found += [
        _certificate("CA certificate", ca, new_ca) if own.ca else _missing("CA certificate", "ca"),
        _private("key", Path(own.key)) if own.key else _missing("key", "key"),
        _try("node", lambda: _node(own)),
        _ledger(own),
        *_data(own),
        *(_try(f"model {name}", lambda name=name: _model(name)) for name in own.models),
        *([_try("GPU", _gpu)] if own.gpu else []),
        _writable("state", Path(own.state)),
        _writable("ledger's directory", Path(own.ledger).parent),
        *(_secure_aggregation(own) if own.secure_aggregation else []),
    ]
    if not own.gateway:
        found.append(_missing("gateway", "gateway"))
    elif ca.is_file():
        found += _gateway(f"https://{own.gateway}/health", ca)
    return found + _flower()


def _data(own: "Settings") -> list[Check]:
    found = [
        _try("records", lambda: _rows(own, own.source, "train")),
        _try("held-out records", lambda: _rows(own, own.test_source, "test"))
        if own.test_source
        else NO_HELD_OUT,
    ]
    if passed(found):
        found.append(_try("training rows", lambda: _training(own)))
    return found


def _secure_aggregation(own: "Settings") -> list[Check]:
    """Check what secure aggregation needs: the peers' keys, enough of them, the store."""
    from client import secure_store

    if not own.peers or not own.key:
        return [_missing("peers", "peers" if own.key else "key")]
    return [
        _try("peers", lambda: _peers(own)),
        _collusion(own),
        _try("secure store", lambda: _store(Path(own.state) / secure_store.FILE)),
    ]


def _peers(own: "Settings") -> str:
    pinned = peers.pinned(Path(own.peers), own.name, peers.read_private(Path(own.key)))
    owners: dict[str, str] = {}
    for name, key in pinned.items():
        other = owners.setdefault(peers.fingerprint(key), name)
        if other != name:
            raise InputError(f"{other} and {name} have one key; ask each for its own")
    least = own.min_honest + own.min_colluding
    if len(pinned) < least:
        raise InputError(
            f"{own.peers} and the own key make {len(pinned)} institutions, below min-honest + "
            f"min-colluding ({least}); pin more keys, or lower one of the two"
        )
    others = ", ".join(name for name in pinned if name != own.name)
    return f"{others}; compare them by telephone (`fedlora deploy fingerprint`)"


def _collusion(own: "Settings") -> Check:
    """Which promises this institution accepts if others collude with the server."""
    if own.min_colluding == noise_shares.MIN_COLLUDING and math.isinf(own.max_alone_epsilon):
        return Check(
            "collusion",
            "warn",
            f"min-colluding is {own.min_colluding} and max-alone-epsilon is inf: a server may "
            "choose a promise that two other institutions can break by telling it their noise; "
            "set one of the two",
        )
    return Check(
        "collusion",
        "ok",
        f"runs that hold against {own.min_colluding} others or more, and with epsilon at most "
        f"{own.max_alone_epsilon:g} against all",
    )


def _store(path: Path) -> str:
    if exposed := files.exposed(path):
        raise InputError(exposed)
    if path.exists() and (mode := path.stat().st_mode & 0o777) & GROUP_AND_OTHERS:
        raise InputError(f"{path} may be read by others (mode {mode:o}); chmod 600 {path}")
    return f"{path}{'' if path.exists() else ' is made by the first run'}"


def _missing(name: str, key: str) -> Check:
    return Check(name, "fail", f"{key} is missing from the settings; add it")


def _gateway(url: str, ca: Path) -> list[Check]:
    try:
        problem, said = get(url, ca)
    except InputError as error:
        problem, said = str(error), {}
    if problem:
        return [Check("gateway", "fail", problem)]
    return [Check("gateway", "ok", url), clock(said["date"]), versions(said["body"])]


def clock(date: str) -> Check:
    """Compare this machine's clock with the gateway's HTTP date, which has whole seconds."""
    try:
        theirs = email.utils.parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return Check(
            "clock", "warn", "the gateway's answer has no time, so clocks cannot be compared"
        )
    skew = (datetime.now(UTC) - theirs).total_seconds()
    side, most = ("ahead of", MAX_SECONDS_AHEAD) if skew > 0 else ("behind", MAX_SECONDS_BEHIND)
    far = abs(skew) > most
    return Check(
        "clock",
        "fail" if far else "ok",
        f"{abs(skew):.0f} s {side} the gateway's"
        + (f"; at most {most:.0f} s are allowed: set this machine's clock (NTP)" if far else ""),
    )


def versions(theirs: Mapping[str, Any]) -> Check:
    """Compare both sides' versions of fedlora and Flower."""
    ours = {"fedlora": fedlora.__version__, "flower": importlib.metadata.version("flwr")}
    if not set(ours) <= set(theirs):
        return Check("versions", "warn", "the gateway does not state its versions; not checked")
    different = [
        f"{name} is {ours[name]} here and {theirs[name]} at the gateway"
        for name in ours
        if ours[name] != theirs[name]
    ]
    return Check(
        "versions",
        "fail" if different else "ok",
        f"{'; '.join(different)}: install the federation's versions"
        if different
        else ", ".join(f"{name} {version}" for name, version in ours.items()),
    )


def _flower() -> list[Check]:
    """Compare the installed Flower with the version that this fedlora requires."""
    needed = next(
        need
        for need in importlib.metadata.requires("fedlora") or ["flwr"]
        if need.startswith("flwr") and not need.startswith("flwr-")
    )
    installed = importlib.metadata.version("flwr")
    wanted = needed.partition("==")[2].partition(";")[0].strip()
    if not wanted or wanted == installed:
        return [Check("flower installed", "ok", installed)]
    return [
        Check(
            "flower installed",
            "fail",
            f"{installed}, and fedlora needs {wanted}; pip install flwr=={wanted}",
        )
    ]


def _certificate(name: str, path: Path, remedy: str = "run `fedlora deploy renew`") -> Check:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        return Check(name, "fail", f"{path} cannot be read: {error.strerror}; {remedy}")
    except ValueError:
        return Check(name, "fail", f"{path} is not a PEM certificate; {remedy}")
    now = datetime.now(UTC)
    until = certificate.not_valid_after_utc
    if certificate.not_valid_before_utc > now:
        return Check(
            name,
            "fail",
            f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M}, in the future; set "
            "this machine's clock",
        )
    days = (until - now).total_seconds() / 86400
    if days <= 0:
        return Check(name, "fail", f"expired on {until:%Y-%m-%d}; {remedy}")
    soon = days < MIN_DAYS_LEFT
    return Check(
        name,
        "warn" if soon else "ok",
        f"valid until {until:%Y-%m-%d}" + f"; {remedy}" * soon,
    )


def _signed(name: str, path: Path, ca: Path) -> Check:
    try:
        authority = x509.load_pem_x509_certificate(ca.read_bytes())
        x509.load_pem_x509_certificate(path.read_bytes()).verify_directly_issued_by(authority)
    except OSError as error:
        return Check(name, "fail", f"{error.filename} cannot be read: {error.strerror}")
    except Exception as error:  # a damaged file, another issuer, or a signature that does not fit
        return Check(name, "fail", f"{path} was not signed by {ca} ({type(error).__name__})")
    return Check(name, "ok", str(path))


def _belongs(name: str, private: Path, certificate: Path, remedy: str) -> Check:
    try:
        seal.read_pair(certificate.read_bytes(), private.read_bytes())
    except OSError as error:
        return Check(name, "fail", f"{error.filename} cannot be read: {error.strerror}; {remedy}")
    except (ValueError, TypeError) as error:
        return Check(name, "fail", f"{private} does not fit {certificate} ({error}); {remedy}")
    return Check(name, "ok", str(private))


def _pair(name: str, private: Path, public: Path) -> Check:
    try:
        ours = peers.read_private(private).public_key()
        theirs = peers.read(public.read_bytes(), public)
    except (OSError, InputError) as error:
        return Check(name, "fail", in_words(error))
    if ours != theirs:
        remedy = f"if the institution made its own, delete {private}"
        return Check(name, "fail", f"{public} is not the public key of {private}; {remedy}")
    return Check(name, "ok", str(public))


def _private(name: str, path: Path, user: int | None = None) -> Check:
    """Check that nobody but its owner may use a file, and that ``user`` is the owner if given."""
    try:
        status = path.stat()
        mode = status.st_mode
        path.open("rb").close()
    except OSError as error:
        return Check(name, "fail", f"{path} cannot be read: {error.strerror}")
    if mode & GROUP_AND_OTHERS:
        return Check(
            name,
            "fail",
            f"{path} may be used by others (mode {mode & 0o777:o}); chmod 600 {path}",
        )
    if user not in (None, status.st_uid):
        return Check(
            name,
            "fail",
            f"{path} belongs to user {status.st_uid}, and the services run as {user} "
            f"(FEDLORA_USER): chown {user} {path}",
        )
    return Check(name, "ok", str(path))


def _equal(name: str, one: Path, other: Path) -> Check:
    try:
        same = one.read_bytes() == other.read_bytes()
    except OSError as error:
        return Check(name, "fail", f"{error.filename} cannot be read: {error.strerror}")
    return Check(name, "ok" if same else "fail", "" if same else f"{one} and {other} differ")


def _writable(name: str, directory: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=directory):
            return Check(name, "ok", str(directory))
    except OSError as error:
        remedy = "" if directory.is_dir() else f"; make it: mkdir -m 700 {directory}"
        return Check(name, "fail", f"{directory} cannot be written: {error.strerror}{remedy}")


def _try(name: str, inspect: Callable[[], str]) -> Check:
    from client.settings import in_own_keys

    try:
        return Check(name, "ok", inspect())
    except (InputError, Refusal, OSError) as error:
        return Check(name, "fail", in_own_keys(in_words(error)))


def _node(own: "Settings") -> str:
    from deployment import node

    node.check(own)
    return "can start"


def _ledger(own: "Settings") -> Check:
    from client.ledger import Ledger

    path = Path(own.ledger)
    try:
        with Ledger.open(path) as ledger:
            shown, accountant = ledger.show(), ledger.accountant
            _fits_records(own, ledger)
    except Refusal as refusal:
        return Check("ledger", "fail", str(refusal))
    if (private := _private("ledger", path)).outcome != "ok":  # as of a copy that was put back
        return private
    if not os.access(path, os.W_OK):
        return Check("ledger", "fail", f"{path} cannot be written; give it to the node's user")
    spent = f"epsilon {at_most(shown['epsilon'])} of {shown['limit']:g} spent"
    if accountant == "prv":
        remedy = (
            "the accountant cannot change for these records, since a second ledger for them voids "
            "the guarantee: keep this ledger, and make the ledger of the next records with "
            "--accountant rdp (docs/deployment.md, 'Other records')"
            if shown["entries"]
            else "nothing is charged yet: replace it by a ledger with --accountant rdp"
        )
        return Check(
            "ledger",
            "warn",
            f"{spent}; its accountant is prv, whose limit does not cover a server that chooses a "
            f"run's noise after it has seen another run; {remedy}",
        )
    return Check("ledger", "ok", spent)


def _fits_records(own: "Settings", ledger: "Ledger") -> None:
    """Hold a ledger against the records as an order would, without binding it to them.

    Raises:
        Refusal: ``ledger-delta`` or ``ledger-foreign``.
    """
    from client import checks

    try:
        shard = _shard(own)
    except (InputError, OSError):  # the checks of the records show it
        return
    checks.check_ledger_delta(ledger, own.ledger, shard.num_units)
    ledger.is_bound(shard.fingerprint, own.unit)


def _shard(own: "Settings") -> "Shard":
    """The training rows of a run, without tokens."""
    from client.config_policy import KEYS, Own
    from fedlora.config.sections import DataConfig
    from fedlora.data import data

    decided = {
        key.removeprefix(DataConfig.prefix).replace("-", "_"): rule.value(own)
        for key, rule in KEYS.items()
        if isinstance(rule, Own) and key.startswith(DataConfig.prefix)
    }
    return data.without_tokens(
        DataConfig(**decided, labels=own.labels),
        unit=own.unit,
        seed=0,  # one institution and no share of held-out rows: nothing is drawn
        task="classification" if own.labels else "sft",
    )


def _rows(own: "Settings", source: str, split: str) -> str:
    """Read a source as a run does; errors that quote a record may go to the terminal."""
    from fedlora.data import rows

    table = rows.read_table(source, own.text, own.label, {}, split, form=own.csv_form)
    if own.labels:
        rows.check_labels(table.labels, own.labels, source, "correct these rows")
    return f"{len(table.texts):,} rows with a text and a label"


def _training(own: "Settings") -> str:
    """Take the training rows as a run does: each has a unit, and held-out texts leave some."""
    return f"{len(_shard(own)):,} rows"


def _gpu() -> str:
    import torch

    check_gpu("gpu is true", "false")
    return torch.cuda.get_device_name()


def _model(name: str) -> str:
    from fedlora.models import base_directory, model_files

    found = model_files.resolve(name)
    return f"{found.path}, SHA-256 {base_directory.digest(found)[:12]}..."

"""Checks of a set-up before anything runs, at the operator's and at an institution."""

import email.utils
import http.client
import importlib.metadata
import json
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
from deployment import keys, node
from deployment.errors import in_words
from fedlora import files
from fedlora.config.sections import check_gpu
from fedlora.errors import InputError, Refusal
from fedlora.rounding import at_most
from fedlora.runs import seal
from fedlora.secure import peers

if TYPE_CHECKING:
    from client.settings import Settings
    from fedlora.data.shards import Shard

MIN_DAYS_LEFT = 30
MAX_SECONDS_AHEAD = 4.0
"""Flower refuses signatures 5 s ahead of its clock; an HTTP date is rounded down by up to 1 s."""
MAX_SECONDS_BEHIND = 60.0
"""Flower accepts signatures up to 305 s behind its clock."""
Outcome = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    outcome: Outcome
    details: str


def passed(checks: list[Check]) -> bool:
    """Whether no check failed."""
    return all(check.outcome != "fail" for check in checks)


def service(url: str, ca: Path, seconds: float = 4.0) -> list[Check]:
    """Check a service at an https address: its certificate, this machine's clock, both versions.

    Args:
        url: The address.
        ca: The certificate of the only accepted CA.
        seconds: The timeout.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with urllib.request.urlopen(url, timeout=seconds, context=context) as response:
            body, date = response.read(4096), response.headers.get("Date", "")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            reason = f"its certificate is not accepted: {reason.verify_message}"
        return [Check("reachable", "fail", f"{url} does not answer under {ca}: {reason}")]
    try:
        said = json.loads(body)
    except ValueError:
        said = {}
    return [Check("reachable", "ok", url), clock(date), versions(said)]


def clock(date: str) -> Check:
    """Compare this machine's clock with a service's HTTP date, which has whole seconds."""
    try:
        theirs = email.utils.parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return Check("clock", "warn", "the answer has no time, so clocks cannot be compared")
    skew = (datetime.now(UTC) - theirs).total_seconds()
    if -MAX_SECONDS_BEHIND <= skew <= MAX_SECONDS_AHEAD:
        return Check("clock", "ok", f"{skew:+.0f} s against the service's")
    return Check(
        "clock",
        "fail",
        f"{skew:+.0f} s against the service's; it must be from -{MAX_SECONDS_BEHIND:.0f} to "
        f"+{MAX_SECONDS_AHEAD:.0f} s: set this machine's clock (NTP)",
    )


def versions(theirs: Mapping[str, Any]) -> Check:
    """Compare both sides' versions of fedlora and Flower."""
    ours = {"fedlora": fedlora.__version__, "flower": importlib.metadata.version("flwr")}
    if not set(ours) <= set(theirs):
        return Check("versions", "warn", "the service does not state its versions; not checked")
    different = [
        f"{k} is {v} here and {theirs[k]} there" for k, v in ours.items() if v != theirs[k]
    ]
    if different:
        said = f"{'; '.join(different)}: install the federation's versions"
        return Check("versions", "fail", said)
    return Check("versions", "ok", ", ".join(f"{name} {value}" for name, value in ours.items()))


def operator(directory: Path) -> list[Check]:
    """Check the operator's directory, which ``fedlora deploy init`` made."""
    ca = directory / "gateway" / "ca.crt"  # ca/ may be on another machine
    if not ca.is_file():
        raise InputError(
            f"{directory} has no gateway/ca.crt; give the directory of `fedlora deploy init`"
        )
    pairs = [(directory / name / "server.pem", "server.key") for name in ("gateway", "superlink")]
    pairs.append((directory / "server" / "keys" / seal.CERTIFICATE, seal.KEY))
    found = [_certificate("CA certificate", ca, ca)]
    for pem, key in pairs:
        name = pem.parent.name if pem.name == "server.pem" else "statement"
        found.append(_certificate(f"{name} certificate", pem, ca))
        found.append(_try(f"{name} key", lambda pem=pem, key=key: _pair(pem, pem.with_name(key))))
    found.append(_try("secrets", lambda: _secrets(directory)))
    public = sorted((directory / "server" / "institutions").glob("*.pub"))
    found += [_try(file.stem, lambda file=file: _public(file)) for file in public]
    if not public:
        found.append(Check("institutions", "fail", "none; `fedlora deploy init` adds one"))
    return found


def institution(path: Path) -> list[Check]:
    """Check an institution by its settings."""
    from client import settings

    path = settings.absolute(path)
    try:
        own = settings.load(str(path))
    except InputError as error:
        return [Check("settings", "fail", str(error))]
    found = [Check("settings", "ok", str(path)), _try("node", lambda: node.check(own) or "")]
    if own.ca:
        ca = Path(own.ca)
        found.append(_certificate("CA certificate", ca, ca))
        if own.gateway and passed(found[-1:]):
            found += service(f"https://{own.gateway}/health", ca)
    rows = [_try("records", lambda: _rows(own, own.source, "train"))]
    if own.test_source:
        rows.append(_try("held-out records", lambda: _rows(own, own.test_source, "test")))
    if passed(rows):
        rows.append(_try("training rows", lambda: f"{len(_shard(own)):,} rows"))
    found += [*rows, _try("ledger", lambda: _ledger(own, compare=passed(rows)))]
    found += [_try(f"model {name}", lambda name=name: _model(name)) for name in own.models]
    if own.gpu:
        found.append(_try("GPU", lambda: check_gpu("gpu is true", "false") or ""))
    found.append(_try("state", lambda: _writable(Path(own.state))))
    if own.secure_aggregation:
        found += _fingerprints(own)
    return found


def _fingerprints(own: "Settings") -> list[Check]:
    """The fingerprints of the own key and the peers', to compare by telephone.

    The operator's word is not enough: the keys decide who takes part in secure aggregation.
    """
    from client import secure_store

    try:
        if not own.peers or not own.key:
            raise InputError("peers or key is missing from the settings; add it")
        pinned = peers.pinned(Path(own.peers), own.name, peers.read_private(Path(own.key)))
        if exposed := files.exposed(Path(own.state) / secure_store.FILE):
            raise InputError(exposed)
        least = own.min_honest + own.min_colluding
        if len({peers.fingerprint(key) for key in pinned.values()}) < max(least, len(pinned)):
            raise InputError(
                f"{own.peers} and the own key must make {least} institutions or more (min-honest + "
                "min-colluding), each with a key of its own; pin more keys, or lower one of the two"
            )
    except (InputError, OSError) as error:
        return [Check("peers", "fail", in_words(error))]
    return [Check(f"key of {name}", "ok", peers.fingerprint(key)) for name, key in pinned.items()]


def _certificate(name: str, path: Path, ca: Path) -> Check:
    """Check that a certificate is valid and signed by the CA."""
    remedy = "`fedlora deploy init` renews all but the CA's, which is at gateway/ca.crt"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.read_bytes()))
    except OSError as error:
        return Check(name, "fail", f"{in_words(error)}; {remedy}")
    except Exception as error:  # a damaged file, another issuer, or a signature that does not fit
        return Check(name, "fail", f"{path} is not signed by {ca} ({type(error).__name__})")
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if certificate.not_valid_before_utc > datetime.now(UTC):
        return Check(name, "fail", "it is not valid yet; set this machine's clock")
    outcome: Outcome = "fail" if left < 0 else "warn" if left < MIN_DAYS_LEFT else "ok"
    until = f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"
    return Check(name, outcome, until if outcome == "ok" else f"{until}; {remedy}")


def _private(path: Path) -> None:
    """Refuse a secret that others than its owner may use."""
    if (mode := path.stat().st_mode) & 0o077:
        raise InputError(f"{path} may be used by others (mode {mode & 0o777:o}); chmod 600 {path}")


def _pair(certificate: Path, key: Path) -> str:
    try:
        seal.read_pair(certificate.read_bytes(), key.read_bytes())
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{key} does not fit {certificate} ({error}); `fedlora deploy init`"
        ) from None
    return str(key)


def _secrets(directory: Path) -> str:
    """Check that each private file is for its owner alone, and both copies of the secret agree."""
    for file in (*directory.rglob("*.key"), *directory.rglob("*.secret")):
        _private(file)
    one, other = (directory / part / "superexec.secret" for part in ("superlink", "server/keys"))
    if one.read_bytes() != other.read_bytes():
        raise InputError(f"{one} and {other} differ; copy the first to the second")
    return "for their owner alone"


def _public(file: Path) -> str:
    """Check an institution's public key and size as its registration will."""
    key = peers.fingerprint(peers.read(file.read_bytes(), file))
    if (stated := file.with_suffix(".size")).exists():
        keys.stated_size(stated)
    return key


def _writable(directory: Path) -> str:
    with tempfile.TemporaryFile(dir=directory):
        return str(directory)


def _try(name: str, inspect: Callable[[], str]) -> Check:
    from client.settings import in_own_keys

    try:
        return Check(name, "ok", inspect())
    except (InputError, Refusal, OSError, ValueError) as error:
        return Check(name, "fail", in_own_keys(in_words(error)))


def _ledger(own: "Settings", *, compare: bool) -> str:
    """Open a ledger; hold it against the records as an order would, without binding it to them."""
    from client import checks
    from client.ledger import Ledger

    path = Path(own.ledger)
    with Ledger.open(path) as ledger:
        shown = ledger.show()
        if compare:
            shard = _shard(own)
            checks.check_ledger_delta(ledger, own.ledger, shard.num_units)
            ledger.is_bound(shard.fingerprint, own.unit)
    _private(path)  # as of a copy that was put back
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} or its directory cannot be written; give it to the node's user")
    return f"epsilon {at_most(shown['epsilon'])} of {shown['limit']:g} spent"


def _shard(own: "Settings") -> "Shard":
    """The training rows of a run, without tokens."""
    from client.config_policy import OWN
    from fedlora.config.sections import DataConfig
    from fedlora.data import data

    decided = {
        key.removeprefix(DataConfig.prefix).replace("-", "_"): value(own)
        for key, value in OWN.items()
        if key.startswith(DataConfig.prefix)
    }
    return data.prepare(
        DataConfig(**decided, labels=own.labels),
        unit=own.unit,
        seed=0,  # one institution and no share of held-out rows: nothing is drawn
        task="classification" if own.labels else "sft",
        encode=data.no_tokens,
    ).all_train


def _rows(own: "Settings", source: str, split: str) -> str:
    """Read a source as a run does; errors that quote a record may go to the terminal."""
    from fedlora.data import rows

    table = rows.read_table(source, own.text, own.label, {}, split)
    if own.labels:
        rows.check_labels(table.labels, own.labels, source, "correct these rows")
    return f"{len(table.texts):,} rows with a text and a label"


def _model(name: str) -> str:
    from fedlora.models import base_directory, model_files

    found = model_files.resolve(name)
    return f"{found.path}, SHA-256 {base_directory.digest(found)[:12]}..."

"""`fedlora verify`: privacy.json held against its run's files, and its figures computed anew."""

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedlora.config.config import RunConfig, load
from fedlora.data import records
from fedlora.errors import InputError, Refusal
from fedlora.files import expanded
from fedlora.models import base_directory, model_files
from fedlora.privacy import accounting, composition, odds
from fedlora.rounding import at_most
from fedlora.runs import model_card, seal
from fedlora.runs.run_files import CONFIG, ENVIRONMENT, PRIVACY, RESULT, read_records, read_run_file
from fedlora.secure import noise_shares
from fedlora.wire.messages import PrivacySpent
from server import binding, institution_privacy, privacy_statement
from server.spending import NOISE_TOLERANCE, Spending

TOLERANCE = 1e-6
"""Relative difference between two machines' figures for one history."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Args:
        name: What was checked.
        state: ``ok``, ``failed``, or ``skipped`` where the check needs something that is not here.
        detail: What was found, in words.
    """

    name: str
    state: Literal["ok", "failed", "skipped"]
    detail: str


class _Skipped(Exception):
    """The check needs something that is not here."""


def verify(run_dir: Path, ca: Path | None = None) -> list[Check]:
    """Check a complete run's privacy.json.

    Args:
        run_dir: The run's directory.
        ca: The federation's CA certificate, PEM; by default the one in ``$FEDLORA_KEYS``. With it
            the statement must be signed, whatever it says of itself. A deployment's needs it.

    Returns:
        All checks. Only the signature of a deployment shows forgery: whoever may write to a
        simulation's directory can make files that agree with one another.

    Raises:
        InputError: If the run is not complete, privacy.json is not bound to it, or a deployment's
            CA is not given or cannot be read.
    """
    read_run_file(run_dir)
    said = read_run_file(run_dir, PRIVACY)
    if "run" not in said or seal.SEAL not in said:
        raise InputError(
            f"{run_dir / 'privacy.json'} is not bound to its run: an earlier version of fedlora "
            "wrote it, or these parts were removed; run again"
        )
    simulated = isinstance(said["run"], dict) and said["run"].get("mode") == "simulation"
    if ca is None and binding.KEYS in os.environ:
        ca = Path(os.environ[binding.KEYS], "ca.crt")
    authority = None if simulated and ca is None else _read(ca)
    checks = _Checks(run_dir=run_dir, said=said, ca=authority)
    return [_outcome(name, check) for name, check in checks.every().items()]


def _read(ca: Path | None) -> bytes:
    if ca is None:
        raise InputError(
            "a deployment's privacy.json is signed; give the certificate of its federation with "
            "--ca (ca.crt, which the operator and each institution have)"
        )
    try:
        return ca.read_bytes()
    except OSError as error:
        raise InputError(f"--ca is {ca}, which cannot be read: {error.strerror}") from None


def _outcome(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, state="ok", detail=check())
    except _Skipped as reason:
        return Check(name=name, state="skipped", detail=str(reason))
    except (InputError, ValueError) as error:
        return Check(name=name, state="failed", detail=str(error))
    except (KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        return Check(name=name, state="failed", detail=f"damaged ({type(error).__name__}: {error})")


@dataclass(frozen=True, kw_only=True)
class _Checks:
    """The checks of one run; each returns what it found, or raises.

    Args:
        run_dir: The run's directory.
        said: The content of privacy.json.
        ca: The CA certificate, PEM; None for a simulation.
    """

    run_dir: Path
    said: Mapping[str, Any]
    ca: bytes | None

    def every(self) -> dict[str, Callable[[], str]]:
        return {
            "seal": lambda: f"SHA-256 {seal.check_digest(self.said)}",
            "signature": self._signature,
            "run": self._run,
            "date": lambda: self._finished().isoformat(),
            "version": self._version,
            "files": self._files,
            "base model": self._base,
            "records": self._records,
            "promise": self._promise,
            "epsilon": self._epsilon,
            "odds": self._odds,
        }

    @property
    def _bound(self) -> Mapping[str, Any]:
        return self.said["run"]

    def _config(self) -> RunConfig:
        return load(self.run_dir / CONFIG)

    def _signature(self) -> str:
        if self.ca is None:
            if self._config().deployed:
                raise ValueError("there is no signature")
            raise _Skipped("a simulation has no server whose key could sign")
        found = seal.check_signature(self.said, self.ca, self._finished())
        return f"by the server's certificate with SHA-256 {found}"

    def _run(self) -> str:
        _same("run", self._bound["id"], read_run_file(self.run_dir)["run"], RESULT)
        _same("mode", self._bound["mode"], binding.mode(self._config()), CONFIG)
        return f"{self._bound['id']}, a {self._bound['mode']}"

    def _finished(self) -> datetime:
        finished = datetime.fromisoformat(self._bound["finished"])
        if finished > datetime.now(UTC):
            raise ValueError(f"{finished.isoformat()} is in the future")
        return finished

    def _version(self) -> str:
        found = read_run_file(self.run_dir, ENVIRONMENT)
        where = ENVIRONMENT
        _same("fedlora", self._bound["fedlora"], found["versions"]["fedlora"], where)
        _same("commit", self._bound["commit"], found["git_sha"], where)
        _same("changes", self._bound["uncommitted_changes"], found["git_dirty"], where)
        return f"{self._bound['fedlora']}, commit {self._bound['commit'] or 'unknown'}"

    def _files(self) -> str:
        said, found = self._bound["files"], binding.digests(self.run_dir)
        changed = sorted(name for name in said.keys() & found if said[name] != found[name])
        for what, names in (
            ("changed after the run", changed),
            ("missing", sorted(said.keys() - found)),
            ("not the run's", sorted(found.keys() - said)),
        ):
            if names:
                raise ValueError(f"{what}: {', '.join(names)}")
        return f"all {len(found)} as the run wrote them, the adapter's among them"

    def _base(self) -> str:
        base, config = self._bound["base"], self._config()
        _same("name", base["name"], model_card.base_name(config), CONFIG)
        said = read_run_file(self.run_dir)["base"]["digest"]
        _same("SHA-256 of its files", base["digest"], said, RESULT)
        try:
            files = model_files.resolve(config.model.name)
        except InputError as error:
            if expanded(config.model.name).is_dir():  # it is here, and refused
                raise ValueError(str(error)) from None
            raise _Skipped(f"its files are not here ({error})") from None
        _same("SHA-256 of its files", base["digest"], base_directory.digest(files), base["name"])
        return f"{base['name']}, SHA-256 of its files {base['digest']}"

    def _records(self) -> str:
        config, said = self._config(), self._bound["records"]
        if config.deployed:
            _same("fingerprint", said, None, "a deployment, whose server has no records")
            return "stayed at the institutions; the server has no fingerprint of them"
        if code := [f"{key} {name}" for key, name in config.plug_ins if key.startswith("data.")]:
            raise _Skipped(f"reading them runs code that the run names ({', '.join(code)})")
        try:
            key = binding.read_key(self.run_dir / binding.RECORDS_KEY)
            found = binding.keyed(key, records.load(config).fingerprint())
        except (InputError, OSError) as error:
            raise _Skipped(f"they cannot be read here ({error})") from None
        _same("fingerprint", said, found, config.data.source)
        return f"{config.data.source}: the run's records"

    def _promise(self) -> str:
        follows = bool(read_run_file(self.run_dir).get("origins"))
        for key, words in privacy_statement.promise(self._config(), follows=follows).items():
            _same(key, self.said.get(key), words, CONFIG)
        return str(self.said["protects"])

    def _epsilon(self) -> str:
        """Compute every epsilon anew, and check its inputs against configuration and rounds."""
        config = self._config()
        rounds = read_records(self.run_dir)
        asked = Counter(name for one in rounds for name in one["institutions"])
        spent = self.said["institutions"] if config.privacy.enabled else {}
        _same("institutions", self.said["institutions"], spent, CONFIG)
        for name, one in spent.items():
            self._institution(config, name, one, asked[name])
        silent = self.said.get("without_report", {}) if config.privacy.enabled else {}
        if missing := asked.keys() - spent.keys() - silent.keys() if config.privacy.enabled else ():
            raise ValueError(f"institutions of rounds.jsonl are missing: {', '.join(missing)}")
        for name, one in silent.items():
            bound = privacy_statement.bound(config, one["rounds_asked"])
            _same(f"without_report of {name}", one, bound, CONFIG)
            if one["rounds_asked"] < asked[name]:
                raise ValueError(f"{name} was asked {asked[name]} times, not {one['rounds_asked']}")
        if config.privacy.hides_institutions:
            _same("institutions", spent, {}, CONFIG)
        largest: float | str = "inf"
        if config.privacy.enabled:
            largest = privacy_statement.largest_epsilon(self.said)
        _same("largest epsilon", largest, read_run_file(self.run_dir)["epsilon_max"], RESULT)
        self._secure_aggregation(config, rounds)
        level = self._level(config, max(asked.values(), default=0))
        if not spent and not silent and not level:
            return "nothing was promised"
        parts = [f"{len(spent)} institutions, at most {at_most(float(largest))}"] if spent else []
        if silent:
            parts.append(f"{len(silent)} without a report, at most {config.privacy.epsilon:g}")
        return "computed anew: " + "; ".join([*parts, *level])

    def _institution(
        self, config: RunConfig, name: str, one: Mapping[str, Any], rounds: int
    ) -> None:
        privacy = config.privacy
        for key in ("unit", "noise", "max_grad_norm"):
            _same(f"{key} of {name}", one[key], getattr(privacy, key), CONFIG)
        least = max(rounds, one["rounds_asked"]) * config.training.local_steps
        if one["steps"] < least or one["rounds_asked"] < rounds:
            raise ValueError(f"steps of {name} are {one['steps']}, but its rounds have {least}")
        history = privacy_statement.history(config, one)
        found = composition.epsilon(history, one["delta"])
        _close(f"epsilon of {name}", one["epsilon"], found)
        if found > privacy.epsilon * (1 + TOLERANCE):
            raise ValueError(f"epsilon of {name} is {found:g}, above {privacy.epsilon:g}")
        self._mechanism(config, name, one)
        unreported = one["steps"] - one["institution_says"]["steps"]
        _same(f"unreported_steps of {name}", one["unreported_steps"], unreported, "the report")
        if privacy.shares_noise:
            alone = accounting.epsilon_alone(history, one["delta"])
            _close(f"epsilon_alone of {name}", one["epsilon_alone"], alone)

    def _mechanism(self, config: RunConfig, name: str, one: Mapping[str, Any]) -> None:
        """Hold noise, rate and delta against the plan that follows from the configuration."""
        spending = Spending(
            config=config, participations=config.federation.participations(self._size)
        )
        try:
            plan = spending.checked(PrivacySpent.stored(one["institution_says"]))
        except Refusal as refusal:
            raise ValueError(f"{name}: {refusal}") from None
        for key in ("sample_rate", "delta"):
            _same(f"{key} of {name}", one[key], getattr(plan, key), CONFIG)
        _planned(name, one["noise_multiplier"], plan.noise_multiplier)
        if config.privacy.shares_noise:
            _planned(
                f"a share of {name}", one["share_noise_multiplier"], plan.share_noise_multiplier
            )

    @functools.cached_property
    def _size(self) -> int:
        """The number of institutions."""
        return read_run_file(self.run_dir)["population"]

    def _secure_aggregation(self, config: RunConfig, rounds: Sequence[Mapping[str, Any]]) -> None:
        privacy = config.privacy
        if not privacy.shares_noise:
            _same("secure_aggregation", self.said.get("secure_aggregation"), None, CONFIG)
            return
        said = self.said["secure_aggregation"]
        for key in ("honest", "colluding"):
            _same(key, said[key], getattr(privacy, key), CONFIG)
        _same("institutions of secure_aggregation", said["institutions"], self._size, RESULT)
        least = noise_shares.least_survivors(self._size, privacy.honest, privacy.colluding)
        _same("least_survivors", said["least_survivors"], least, CONFIG)
        for one in rounds:
            if not one["skipped"] and one["updates"] < least:
                raise ValueError(
                    f"round {one['round']} added up {one['updates']} vectors, but a sum needs "
                    f"{least}"
                )

    def _level(self, config: RunConfig, rounds: int) -> list[str]:
        """The second mechanism, which hides institutions.

        Args:
            config: The run's configuration.
            rounds: The most rounds that have one institution, by rounds.jsonl.
        """
        level = self.said.get("institution_level")
        privacy = config.privacy
        if not privacy.hides_institutions:
            _same("institution_level", level, None, CONFIG)
            return []
        if level is None:
            raise ValueError(f"institution_level is missing, which {CONFIG} asks for")
        plan = institution_privacy.plan(
            config, self._size, config.federation.participations(self._size)
        )
        _planned("institution_level", level["noise_multiplier"], plan.noise_multiplier)
        found = dataclasses.replace(plan, noise_multiplier=level["noise_multiplier"])
        expected = found.spending(max(level["steps"], rounds))
        for key, value in expected.items():
            _close(f"{key} of institution_level", level[key], value)
        if expected["epsilon"] > privacy.institution_epsilon * (1 + TOLERANCE):
            raise ValueError(
                f"epsilon of institution_level is {expected['epsilon']:g}, above "
                f"{privacy.institution_epsilon:g}"
            )
        return [f"institutions as a whole {at_most(expected['epsilon'])}"]

    def _odds(self) -> str:
        config = self._config()
        silent = self.said.get("without_report", {})
        found = privacy_statement.odds_of(config, self.said["institutions"], silent)
        _close("odds", self.said.get("odds"), found.get("odds"))
        level = self.said.get("institution_level", {})
        if level and config.privacy.noise == "secure" and "odds" not in level:
            raise ValueError("odds of institution_level are missing")
        if "odds" in level:
            history = institution_privacy.history(level["noise_multiplier"], level["steps"])
            again = odds.bounds(history, level["epsilon"], level["delta"])
            _close("odds of institution_level", level["odds"], again)
        return "computed anew" if found or "odds" in level else "nothing was promised"


def _same(name: str, said: Any, found: Any, where: str) -> None:
    if said != found:
        raise ValueError(f"{name} is {_short(said)}, but {_short(found)} by {where}")


def _planned(name: str, said: float, sigma: float) -> None:
    """Require the planned noise, up to the difference between two machines' searches."""
    if not abs(said - sigma) <= NOISE_TOLERANCE * sigma:
        raise ValueError(f"noise_multiplier of {name} is {said}, but the plan has {sigma}")


def _close(name: str, said: Any, found: Any) -> None:
    """Require equal figures up to rounding; dictionaries figure by figure."""
    if isinstance(found, dict) and isinstance(said, dict) and said.keys() == found.keys():
        for key, value in found.items():
            _close(f"{name}, {key}", said[key], value)
        return
    if isinstance(found, float) and isinstance(said, int | float | str):
        equal = math.isclose(float(said), found, rel_tol=TOLERANCE, abs_tol=1e-12)
    else:
        equal = said == found
    if not equal:
        raise ValueError(f"{name} is {_short(said)}, but {_short(found)} computed anew")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

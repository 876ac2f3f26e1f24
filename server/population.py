"""The institutions and the held-out rows of a run, as the server plans for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.arrays import Int64
from fedlora.config.config import RunConfig
from fedlora.data import data, findings, records
from fedlora.data.findings import Finding
from fedlora.data.shards import Federation, Shard
from fedlora.errors import InputError
from fedlora.models import trainable
from fedlora.privacy import accounting
from fedlora.secure import noise_shares
from strategies import robust


@dataclass(frozen=True, kw_only=True)
class Population:
    """Institutions and held-out rows.

    Args:
        size: The number of institutions.
        names: The institutions' names, which only a simulation knows beforehand.
        labels: The classes; empty for sft.
        held_out: The rows for measurement; None where there are none.
        owner: The institution of each held-out row ``(n,)``, an index of ``names``, or None.
        counts: The numbers of rows that were read, truncated or dropped.
        findings: The findings on a simulation that do not stop it.
        fingerprint: SHA-256 of the rows, which must not change before a run is resumed.
    """

    size: int
    names: tuple[str, ...]
    labels: tuple[str, ...]
    held_out: Shard | None
    owner: Int64 | None
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    fingerprint: str


def population_of(config: RunConfig) -> Population:
    """The population of a run, checked against its configuration.

    In a simulation the server reads all records. In a deployment it reads none: the configuration
    gives the number of institutions, and the held-out rows are the server's own
    ``data.test-source``.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    return _deployed(config) if config.deployed else _simulated(config)


def _simulated(config: RunConfig) -> Population:
    federation = records.load(config)
    found = check(config, federation)
    held_out, owner = federation.pooled_held_out()
    return Population(
        size=len(federation.names),
        names=federation.names,
        labels=federation.labels,
        held_out=held_out,
        owner=owner,
        counts=federation.counts,
        findings=tuple(found),
        fingerprint=federation.fingerprint(),
    )


def check(config: RunConfig, records: Federation) -> list[Finding]:
    """Check a simulation's configuration against its records.

    Returns:
        The findings that do not stop the run: warnings, and those that the run accepts.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    check_settings(config, records)
    cap = config.federation.participations(len(records.names))
    found = findings.findings(config, records, cap)
    findings.refuse(config, found)
    return found


def check_settings(config: RunConfig, records: Federation) -> None:
    """Check the settings of a simulation that depend on its institutions and records.

    Raises:
        InputError: Naming value, bound and remedy.
    """
    size = len(records.names)
    check_federation(config, size)
    if not len(records.all_held_out):
        if lost := findings.not_measured(records):
            raise InputError(
                f"all {lost:,} rows of data.test-source that could be measured on are of "
                "institutions that do not train; those that do are "
                f"{findings.some(records.names)}: {findings.ALIKE}"
            )
        classes, rows = len(records.labels), len(records.all_train)
        raise InputError(
            f"there are 0 held-out rows to measure on; raise data.test-fraction (now "
            f"{config.data.test_fraction:g}), give more data or, as the last text of a class stays "
            f"in training, another data.label ({config.data.label!r} has {classes} classes for "
            f"{rows} rows; answers written out need model.task = sft)"
        )
    if config.privacy.enabled and config.privacy.delta:
        largest = accounting.most_of_class(
            max(records.units)
        )  # institutions plan for their size class
        accounting.check_delta(config.privacy.delta, largest)


def _deployed(config: RunConfig) -> Population:
    check_federation(config, config.data.institutions)
    held_out, counts = None, dict[str, int]()
    if config.data.test_source:
        task = trainable.load(config, config.data.labels).task
        held_out, found = data.load_shard(
            config.data, config.data.test_source, labels=config.data.labels, encode=task.encode
        )
        counts["truncated"] = found["truncated"]
    return Population(
        size=config.data.institutions,
        names=(),
        labels=config.data.labels,
        held_out=held_out,
        owner=None,
        counts=counts,
        findings=(),
        fingerprint="" if held_out is None else held_out.fingerprint,
    )


def check_federation(config: RunConfig, institutions: int) -> None:
    """Check the settings that depend on the number of institutions."""
    federation = config.federation
    remedy = (
        "lower it or raise data.institutions"
        if config.deployed
        else f"lower it or lower data.min-records (now {config.data.min_records})"
    )
    if federation.institutions_per_round > institutions:
        raise InputError(
            f"federation.institutions-per-round is {federation.institutions_per_round}, but only "
            f"{institutions} institutions have data; {remedy}"
        )
    privacy = config.privacy
    if privacy.shares_noise and privacy.colluding < noise_shares.MIN_COLLUDING:
        raise InputError(
            f"privacy.colluding is {privacy.colluding}, but under secure aggregation it must be at "
            f"least {noise_shares.MIN_COLLUDING}: each institution knows its own share of the "
            "noise, so that one of them can always take a share out of a sum"
        )
    if privacy.shares_noise and privacy.honest + privacy.colluding > institutions:
        raise InputError(
            f"privacy.honest is {privacy.honest} and privacy.colluding {privacy.colluding}, but "
            f"only {institutions} institutions have data; lower one of them"
        )
    asked = federation.institutions_per_round or institutions
    if federation.robust != "none" and not robust.enough(*federation.robust_rule, asked):
        raise InputError(
            f"federation.robust is {federation.robust!r}, which needs more than {asked} "
            "institutions a round: at least 2 f + 3, of which f are bad; ask more institutions or "
            "assume a smaller share, as in multi-krum:0.1"
        )

"""The end of a run: the released adapter, models at home, privacy.json and result.json."""

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.serverapp import Grid

from fedlora.config import plugins
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models.adapters import AdapterState
from fedlora.models.model_files import Origin
from fedlora.models.trainable import Trainable
from fedlora.privacy.budget import delta_of
from fedlora.runs import model_card
from fedlora.runs.seal import Signer
from fedlora.wire import released, wire
from fedlora.wire.messages import EvaluateOrder, Release
from server import answers, binding, joining
from server.population import Population
from server.privacy_statement import epsilon_alone, largest_epsilon, statement
from server.roster import Roster
from server.run_directory import RunDirectory, RunState
from server.spending import Spending
from server.start import origins


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run after its last round.

    Args:
        grid: To the institutions.
        config: The run.
        state: Its last state.
        work: Its model.
        population: Its institutions and held-out rows.
        roster: Its institutions' nodes.
        directory: Its files.
        level: What its aggregation states in privacy.json.
        spending: The possible spending of an institution; None without DP.
        measured: The figures on held-out rows.
        signer: The key that signs privacy.json; None in a simulation.
    """

    grid: Grid
    config: RunConfig
    state: RunState
    work: Trainable
    population: Population
    roster: Roster
    directory: RunDirectory
    level: Mapping[str, Any]
    spending: Spending | None
    measured: Mapping[str, Any]
    signer: Signer | None


def write(run: Ended) -> None:
    """Write the final adapter, hand it out, and write privacy.json and result.json."""
    config, state, folder = run.config, run.state, run.directory.path / "adapter"
    adapter = state.final_adapter()
    for draft in folder.glob(".*"):
        if draft.is_file():
            draft.unlink()  # of a killed process; privacy.json binds all files in the directory
    adapter.save(folder, run.work.model)
    behind = origins(config)
    optional = {
        "released": _hand_out(run, adapter, behind) if config.deployed else {},
        "joining": _compare_at_home(run, adapter),
        "origins": behind,
        "head": state.head,
    }
    names = run.population.names or sorted(state.asked)
    follows = bool(behind)
    privacy = statement(config, names, state, run.level, run.spending, follows=follows)
    if config.plug_ins:
        privacy = {**privacy, "plug_ins": plugins.describe(config.plug_ins)}
    optional["epsilon_alone_max"] = epsilon_alone(privacy)
    result = _result(run, adapter, privacy) | {k: v for k, v in optional.items() if v}
    model_card.write_adapter(folder, config, run.work, result, privacy)
    signer = run.signer
    with contextlib.suppress(InputError):  # the key was renewed meanwhile, or is the first one
        signer = binding.signer(config)
    fingerprint = run.population.fingerprint
    run.directory.write_result(result, privacy, config, records=fingerprint, signer=signer)


def _result(run: Ended, adapter: AdapterState, privacy: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that every result.json has."""
    config, state, base = run.config, run.state, run.work.base
    trained = adapter.only(config.federation.traits.trained_parts)
    found = (*run.population.findings, *run.roster.findings())
    return {
        **run.measured,
        "epsilon_max": largest_epsilon(privacy) if config.privacy.enabled else float("inf"),
        "delta": _largest_delta(config, privacy),
        "rounds": state.round,
        "seconds": round(state.seconds, 2),
        "run": state.run,
        "run_dir": str(run.directory.path),
        "base": {"name": config.model.name, "digest": base.digest, "dtype": base.dtype_name},
        "labels": list(run.work.labels),
        "population": run.population.size,
        "nonce": secrets.token_hex(16),
        "trained_parameters": sum(tensor.numel() for tensor in trained.values()),
        "counts": dict(run.population.counts),
        "findings": [dataclasses.asdict(finding) for finding in found],
    }


def _nodes(run: Ended) -> dict[int, str]:
    return {node: name for name, node in run.roster.online().items()}


def _compare_at_home(run: Ended, adapter: AdapterState) -> dict[str, Any]:
    """The models that institutions train at home, compared; empty where none are trained."""
    config, state, population = run.config, run.state, run.population
    chosen = {population.names[i] for i in config.at_home(population.size)}
    if not chosen:
        return {}
    return joining.measure(
        run.grid,
        EvaluateOrder(run=state.run, round=state.round, save=True, adapter=adapter),
        {node: name for node, name in _nodes(run).items() if name in chosen},
        config,
        population,
    )


def _hand_out(run: Ended, adapter: AdapterState, behind: Sequence[Origin]) -> dict[str, str]:
    """Write down the released adapter of a deployed run, and send it to its institutions.

    Args:
        run: The run.
        adapter: The adapter.
        behind: The runs that it goes back to.

    Returns:
        Institution -> ``stored``, or the reason why it has no adapter; all registered ones.
    """
    config, state = run.config, run.state
    release = Release(
        run=state.run,
        name=run.directory.path.name,
        round=state.round,
        base=run.work.base.digest,
        origins=behind,
        adapter=adapter,
    )
    released.describe(run.directory.path / "adapter", release, config.public())
    stored, failed = answers.ask(
        run.grid, config, release, wire.RELEASED, _nodes(run), lambda name, answer: "stored"
    )
    absent = dict.fromkeys(state.asked, "offline") | run.roster.absent()
    return dict(sorted({**absent, **stored, **failed}.items()))


def _largest_delta(config: RunConfig, privacy: Mapping[str, Any]) -> float | None:
    """The largest delta of an institution; None without DP, or where none is known.

    A simulation counts institutions that did not report, too.

    Args:
        config: The run.
        privacy: The content of privacy.json.
    """
    if not config.privacy.enabled:
        return None
    if config.privacy.delta:
        return config.privacy.delta
    if config.deployed:
        known = [] if privacy["without_report"] else privacy["institutions"].values()
        return max((one["delta"] for one in known), default=None)
    return max(delta_of(config.privacy, units) for units in records.load(config).units)

"""The keyword arguments of `library.run.run`: every configuration key under a name of Python.

A keyword is the key's last part with underscores: ``sample_rate`` for ``training.sample-rate``.
``model`` stands for ``model.name``, and keys of ``[home]`` begin with ``home_``. A test compares
this list with the configuration.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from fedlora.config import plugins, schemes
from fedlora.config.config import describe
from fedlora.errors import InputError
from strategies.base import Strategy

PlugIn = str | Callable[..., Any] | Strategy
"""Code of one's own, or its name as ``module:object``."""
OWN = {
    "data.source": "data",
    "data.test-source": "test_data",
    "run-dir": "out",
    "tracking.callbacks": "on_round",
}
"""Keys that `library.run.run` takes as arguments of other names."""


class Keywords(TypedDict, total=False):
    """Every key as a keyword; `fedlora config` and docs/python.md say what each means."""

    seed: int
    accept: Sequence[str]
    # [model]
    model: str | Path
    dtype: str
    quantization: str
    task: str
    # [adapter]
    method: str
    rank: int
    alpha: float
    dropout: float
    head: str
    start: str | Path
    target_modules: Sequence[str]
    # [data]
    partition: PlugIn
    institutions: int
    min_records: int
    max_records: int
    text: str
    label: str
    labels: Sequence[str]
    prompt: str
    test_fraction: float
    view: str
    # [training]
    local_steps: int
    batch_size: int
    sample_rate: float
    physical_batch: int
    learning_rate: float
    optimizer: str
    proximal: float
    max_length: int
    gradient_checkpointing: bool
    # [federation]
    rounds: int
    strategy: PlugIn
    metrics: PlugIn | Sequence[PlugIn]
    institutions_per_round: int
    weighting: str
    robust: str
    server_optimizer: str
    server_learning_rate: float
    server_head_learning_rate: float
    timeout: float
    # [privacy]
    trust: str
    honest: int
    colluding: int
    protocol: str
    epsilon: float
    delta: float
    max_grad_norm: float
    unit: str
    noise: str
    ledger: str | Path
    max_epsilon: float
    institution_epsilon: float
    institution_max_norm: float
    # [home]
    home_method: str
    home_steps: int
    home_institutions: int
    # [engine]
    workers: int
    threads: int
    gpus: float
    ray_address: str
    # [tracking]
    mlflow: str
    mlflow_model: str
    tensorboard: str


def overrides(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as ``section.key`` -> value. Plug-ins are named, and found in this process.

    Raises:
        InputError: For a keyword that is none, with the nearest one.
    """
    known = keys()
    same = {key.rpartition(".")[2].replace("-", "_"): own for key, own in OWN.items()}
    found: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in known:
            if name in same:
                raise InputError(f"{name} is no keyword of fedlora.run; did you mean {same[name]}?")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else "`fedlora config` lists the keys; a keyword is the last part, with _"
            )
            raise InputError(f"{name} is no keyword of fedlora.run; {hint}")
        found[known[name]] = _plain(known[name], value)
    return found


def keys() -> dict[str, str]:
    """Keyword -> ``section.key``."""
    found: dict[str, str] = {}
    for key, *_ in describe():
        section, _, last = key.rpartition(".")
        name = last.replace("-", "_")
        if section == "home":
            name = f"home_{name}"
        if key not in OWN:
            found["model" if key == "model.name" else name] = key
    return found


def _plain(key: str, value: Any) -> Any:
    """A value as the configuration has it: names for objects, lists for sequences."""
    if key == "federation.strategy":
        return plugins.give(key, value)
    if key == "federation.metrics" and not isinstance(value, str):
        several = cast(Sequence[Any], value) if isinstance(value, Sequence) else [value]
        return [plugins.give(key, one) for one in several]
    if key == "data.partition" and not isinstance(value, str):
        return schemes.PYTHON + plugins.give(key, value)
    return value

"""Federated LoRA under differential privacy, and what servers and institutions share.

`run` simulates a federation and gives a `Result`; docs/python.md describes the names below. The
modules of this package are what servers and institutions share: configuration, models, adapters,
tasks, data, privacy accounting, the wire.

Importing fedlora loads nothing else: each name is loaded when it is first used.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

__version__ = "0.3.0"

_NAMES = {
    "run": "simulation.federate",
    "Result": "simulation.result",
    "load": "fedlora.config.config",
    "RunConfig": "fedlora.config.config",
    "ModelConfig": "fedlora.config.config",
    "AdapterConfig": "fedlora.config.config",
    "DataConfig": "fedlora.config.config",
    "TrainingConfig": "fedlora.config.config",
    "FederationConfig": "fedlora.config.config",
    "PrivacyConfig": "fedlora.config.config",
    "HomeConfig": "fedlora.config.config",
    "EngineConfig": "fedlora.config.config",
    "TrackingConfig": "fedlora.config.config",
    "InputError": "fedlora.errors",
    "RunFailed": "server.roster",
    "AdapterState": "fedlora.models.adapters",
    "Round": "strategies.base",
    "Strategy": "strategies.base",
    "Collected": "strategies.collected",
}
"""Public name -> its module; ``__init__.pyi`` says the same to editors and type checkers."""
__all__ = ["__version__", *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]


ROOMS = (
    "cli",
    "client",
    "deployment",
    "experiments",
    "server",
    "simulation",
    "strategies",
)
"""The other packages of fedlora, which lie beside this one."""


def _check_rooms() -> None:
    """Refuse a module of the user's own that has the name of one of fedlora's packages."""
    here = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec and spec.origin and here not in Path(spec.origin).resolve().parents:
            raise ImportError(
                f"{spec.origin} hides the package {room!r} of fedlora; rename it and start anew"
            )


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_rooms()
    found = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

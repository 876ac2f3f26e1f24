"""Federated LoRA under differential privacy, and what servers and institutions share.

`run` simulates a federation and gives a `Result`; docs/python.md describes the names below. The
modules of this package are what servers and institutions share: configuration, models, adapters,
tasks, data, privacy accounting, the wire.

Importing fedlora loads nothing else: each name is loaded when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_NAMES = {
    "run": "library.run",
    "Result": "library.result",
    "load": "fedlora.config",
    "RunConfig": "fedlora.config",
    "ModelConfig": "fedlora.config",
    "AdapterConfig": "fedlora.config",
    "DataConfig": "fedlora.config",
    "TrainingConfig": "fedlora.config",
    "FederationConfig": "fedlora.config",
    "PrivacyConfig": "fedlora.config",
    "HomeConfig": "fedlora.config",
    "EngineConfig": "fedlora.config",
    "TrackingConfig": "fedlora.config",
    "InputError": "fedlora.errors",
    "RunFailed": "server.roster",
    "AdapterState": "fedlora.adapters",
    "Predictions": "fedlora.metrics",
    "Round": "strategies.base",
    "Strategy": "strategies.base",
    "collect": "strategies.collected",
}
"""Public name -> its module; ``__init__.pyi`` says the same to editors and type checkers."""
__all__ = ["__version__", *_NAMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What the sections of a configuration must agree on, so that a promise or a method holds."""

import math
from collections.abc import Mapping, Sequence

from fedlora.config.sections import (
    MAX_LIST_TEXT,
    FederationConfig,
    HomeConfig,
    PrivacyConfig,
)
from fedlora.config.settings_schema import Scalar
from fedlora.config.strategy_table import names_with
from fedlora.errors import InputError
from fedlora.secure import noise_shares


def check_federation(federation: FederationConfig, privacy: PrivacyConfig) -> None:
    """Refuse rounds and weights under which a promise would not hold, or could not be planned."""
    if not federation.rounds and privacy.under_dp:
        raise InputError(
            "federation.rounds is 0, so nothing is trained and there is no budget to plan; set "
            "privacy.epsilon and privacy.institution-epsilon to inf, or rounds to at least 1"
        )
    if privacy.enabled and federation.weighting == "records":
        raise InputError(
            "federation.weighting is 'records', but exact counts may not leave under DP; "
            "use uniform or public-size"
        )
    if privacy.hides_institutions and federation.weighting != "uniform":
        raise InputError(
            f"federation.weighting is {federation.weighting!r}, but "
            "privacy.institution-epsilon bounds every institution's influence alike; "
            "use uniform"
        )
    if privacy.hides_institutions and not federation.traits.factor_means:
        raise InputError(
            f"federation.strategy is {federation.strategy!r}, but with "
            "privacy.institution-epsilon the server adds noise to a mean of the factors "
            f"themselves; use {names_with(lambda t: t.factor_means)}"
        )


def check_lists(flat: Mapping[str, Scalar]) -> None:
    """Refuse lists of a deployed run that no institution would read."""
    for name in ("data.labels", "adapter.target-modules"):
        length = len(str(flat[name]))
        if length > MAX_LIST_TEXT:
            raise InputError(
                f"{name} has {length} characters in JSON, but data.source is 'institutions', and "
                f"an institution reads at most {MAX_LIST_TEXT}; use shorter names, or fewer"
            )


def check_strategy(federation: FederationConfig) -> None:
    """Refuse settings under which a strategy would not be the method of its paper."""
    strategy, traits = federation.strategy, federation.traits
    stepped = federation.server_optimizer != "none" or federation.server_learning_rate != 1
    if traits.no_server_optimizer and stepped:
        raise InputError(
            f"federation.server-optimizer is {federation.server_optimizer!r} with "
            f"server-learning-rate {federation.server_learning_rate:g}, but federation.strategy "
            f"{strategy!r} takes no server optimizer; use none and 1, and set the step with "
            "training.learning-rate"
        )


def check_home(home: HomeConfig, task: str) -> None:
    """Refuse models at home that cannot be compared."""
    if task == "sft" and home.method != "none":
        raise InputError(
            f"home.method is {home.method!r}, but model.task is 'sft': models at home are compared "
            "by the rows on which they name the right class, and a response has no class; use none"
        )


def check_plug_ins(plug_ins: Sequence[tuple[str, str]]) -> None:
    """Refuse names of plug-ins that are not module:object."""
    for place, name in plug_ins:
        if not all(name.partition(":")):
            raise InputError(f"{place} is {name!r}; it must be module:object, such as mine:median")


def check_robust(federation: FederationConfig, privacy: PrivacyConfig) -> None:
    """Refuse a robust rule where its guarantee would not hold."""
    rule, strategy, traits = federation.robust, federation.strategy, federation.traits
    if rule == "none":
        return
    if rule == "median" and not traits.factor_means:
        raise InputError(
            "federation.robust is 'median', which takes each coordinate of the factors by itself, "
            f"but federation.strategy {strategy!r} does not average each factor by itself; use "
            f"multi-krum, or {names_with(lambda t: t.factor_means)}"
        )
    if rule != "median" and traits.local_parts:
        raise InputError(
            f"federation.robust is {rule!r}, which measures products, but under "
            f"federation.strategy {strategy!r} institutions keep their B; use median"
        )
    if rule == "median" and federation.weighting != "uniform":
        raise InputError(
            f"federation.robust is {rule!r}, which takes no weights, but federation.weighting is "
            f"{federation.weighting!r}; use uniform, or multi-krum"
        )
    if privacy.hides_institutions:
        raise InputError(
            f"federation.robust is {rule!r}, but privacy.institution-epsilon needs a mean whose "
            "sensitivity is known, and itself bounds every institution's influence; use none"
        )


_ONE_STEP = "an institution sends the sum of one step's clipped gradients in a round"
_NO_UPDATE = "the server sees no single update"
_SECURE: Mapping[str, tuple[Scalar, str]] = {
    "training.local-steps": (1, _ONE_STEP),
    "training.optimizer": ("sgd", _ONE_STEP),
    "training.proximal": (0, _ONE_STEP),
    "federation.weighting": ("public-size", "the sum counts every record alike"),
    "federation.institutions-per-round": (0, "all institutions are asked in every round"),
    "federation.robust": ("none", _NO_UPDATE),
    "privacy.institution-epsilon": (math.inf, _NO_UPDATE),
}
"""Key -> the only value under secure aggregation, and the reason."""


def check_secure(
    federation: FederationConfig,
    privacy: PrivacyConfig,
    flat: Mapping[str, Scalar],
    *,
    deployed: bool,
) -> None:
    """Refuse settings under which secure aggregation would not keep its promise.

    The server sees the sum of clipped gradients of one Poisson step at all institutions.
    """
    trust = f"privacy.trust {privacy.trust!r}"
    if not privacy.enabled:
        raise InputError(
            f"privacy.epsilon is inf, but {trust} adds up shares of noise; give a budget, or use "
            "privacy.trust local"
        )
    if privacy.honest < noise_shares.MIN_HONEST:
        raise InputError(
            f"privacy.honest is {privacy.honest}, but under {trust} it must be at least "
            f"{noise_shares.MIN_HONEST}: set it to the number of institutions whose noise is "
            "surely in every sum"
        )
    if not federation.traits.linear:
        raise InputError(
            f"federation.strategy is {federation.strategy!r}, which is not the plain mean of all "
            f"trained factors, but under {trust} the server steps on their sum; use "
            f"{names_with(lambda t: t.linear)}"
        )
    for name, (value, why) in _SECURE.items():
        if flat[name] != value:
            raise InputError(
                f"{name} is {flat[name]!r}, but under {trust} {why}; set it to {value!r}"
            )
    if not privacy.delta or float(flat["training.batch-size"]) >= 1:
        name = "training.batch-size" if privacy.delta else "privacy.delta"
        raise InputError(
            f"{name} is {flat[name]:g}, from which a value by an institution's size follows, but "
            f"under {trust} all institutions plan the same noise; give a delta above 0 and a share "
            "of the records as training.batch-size"
        )
    institutions = int(flat["data.institutions"])
    if deployed and (shares := institutions * federation.rounds) > noise_shares.MAX_SHARES:
        raise InputError(
            f"data.institutions is {institutions} and federation.rounds is {federation.rounds}, "
            f"but under {trust} each institution sends shares of keys for every institution and "
            f"round in one message, and of these {shares} only {noise_shares.MAX_SHARES} fit: "
            "lower federation.rounds, or split the run among fewer institutions"
        )

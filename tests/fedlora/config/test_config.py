import math
import re

import pandas
import pytest

from fedlora.config import config, gone
from fedlora.errors import InputError

FRAME = pandas.DataFrame({"text": ["a secret record"]})


@pytest.mark.parametrize(
    ("rounds", "every", "times"),
    [(30, 5, 6), (12, 2, 6), (3, 1, 3), (13, 2, 7), (0, 1, 1)],
)
def test_a_run_evaluates_every_so_often_and_at_its_end(rounds, every, times):
    made = config.from_flat({"federation.rounds": rounds, "privacy.epsilon": math.inf}).federation
    assert (made.evaluate_every, made.evaluations) == (every, times)


def test_a_configuration_survives_toml_and_flowers_flat_form(tmp_path):
    made = config.from_flat(
        {
            "privacy.epsilon": math.inf,
            "adapter.target-modules": ["q_proj", "v_proj"],
            "data.labels": ['with "quotes"', "a, comma"],
            "training.batch-size": 7,
        }
    )
    file = tmp_path / "x.toml"
    file.write_text(made.to_toml())
    assert config.load(file) == made
    assert config.from_flat(made.flat()) == made


@pytest.mark.parametrize("key", gone.KEYS)
def test_a_key_that_is_gone_says_what_to_use(key):
    assert key not in config.RunConfig().flat()
    with pytest.raises(InputError, match=rf"^{re.escape(key)} is gone; \S"):
        config.from_flat({key: 1})


def test_every_key_is_described_with_its_default():
    described = {key for key, *_ in config.describe()}
    assert described == set(config.RunConfig().flat())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapter.rank", 0, ["adapter.rank", "0", "at least 1"]),
        ("adapter.rank", 2.5, ["adapter.rank", "2.5", "whole number"]),
        ("privacy.epsilon", -1, ["privacy.epsilon", "-1", "above 0"]),
        ("privacy.epsilon", "nan", ["privacy.epsilon", "nan", "above 0"]),
        ("privacy.delta", 1.0, ["privacy.delta", "1", "below 1"]),
        ("adapter.method", "lorra", ["lorra", "lora", "did you mean 'lora'"]),
        ("adapter.methd", "lora", ["adapter.methd", "did you mean adapter.method"]),
        ("epsilon", 3, ["epsilon is not", "did you mean privacy.epsilon?"]),
        ("rounds", 3, ["rounds is not", "did you mean federation.rounds?"]),
        ("training.batch-size", True, ["training.batch-size", "True", "number"]),
        ("seed", "x", ["seed", "'x'", "whole number below 2^63, at least 0"]),
        ("data.partition", "dirichlet:0", ["data.partition", "dirichlet:ALPHA"]),
        ("data.partition", "iid", ["data.institutions", "0", "1 or more"]),
        ("training.gradient-checkpointing", 3, ["true or false"]),
        ("federation.server-learning-rate", "inf", ["server-learning-rate", "inf", "finite"]),
        ("data.partition", "pathological:²", ["data.partition", "pathological:CLASSES"]),
        ("data.partition", "pathological:" + "9" * 5000, ["data.partition"]),
        ("adapter.rank", "9" * 400, ["adapter.rank", "whole number below 2^63"]),
        ("adapter.alpha", 0, ["adapter.alpha", "0", "at least 1e-06"]),
        ("adapter.alpha", "nan", ["adapter.alpha", "nan", "at least 1e-06"]),
        ("adapter.dropout", 1 - 1e-16, ["adapter.dropout", "at most 0.99"]),
        ("training.learning-rate", 5e-324, ["learning-rate", "at least 1e-07"]),
        ("training.batch-size", 5e-324, ["training.batch-size", "at least 1e-06"]),
        ("privacy.delta", 5e-324, ["privacy.delta", "0 or at least 1e-30"]),
        ("training.proximal", 2.5, ["training.proximal", "2.5", "product must be at most 2"]),
        ("data.source", "", ["data.source is empty", "give"]),
        ("data.source", " ", ["data.source is empty", "give"]),
        ("data.labels", "[" * 100_000, ["data.labels", "list of text"]),
        ("data.labels", f"[{'9' * 5000}]", ["data.labels", "list of text"]),
        ("data.labels", '["\\ud800"]', ["data.labels", "surrogate pair"]),
        ("data.prompt", "\ud800", ["data.prompt", "surrogate pair"]),
        ("run-dir", "a\0b", ["run-dir", "Unicode text without NUL"]),
    ],
)
def test_a_bad_value_is_named_with_its_bound(key, value, words):
    with pytest.raises(InputError) as caught:
        config.from_flat({key: value})
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_values_that_exclude_each_other_are_refused():
    with pytest.raises(InputError, match="assigns classes, but model"):
        config.from_flat(
            {"model.task": "sft", "data.partition": "dirichlet:0.5", "data.institutions": 4}
        )
    with pytest.raises(InputError, match="exact counts may not leave under DP"):
        config.from_flat({"federation.weighting": "records"})
    with pytest.raises(InputError, match="a mean of the factors themselves"):
        config.from_flat({"federation.strategy": "svd", "privacy.institution-epsilon": 3.0})


def test_instruction_tuning_trains_no_models_at_home_and_refuses_a_method():
    tuning = {"model.task": "sft", "data.partition": "iid", "data.institutions": 2}
    made = config.from_flat(tuning)
    assert made.home.method == "none" and config.from_flat(made.flat()) == made
    assert config.from_flat({}).home.method == "interpolate"
    with pytest.raises(InputError, match="a response has no class; use none"):
        config.from_flat({**tuning, "home.method": "interpolate"})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"federation.robust": "median", "federation.strategy": "svd"},
            "does not average each factor by itself",
        ),
        ({"federation.robust": "median", "federation.weighting": "public-size"}, "no weights"),
        ({"federation.robust": "multi-krum", "privacy.institution-epsilon": 3.0}, "sensitivity"),
        *(({"federation.robust": f"multi-krum:{share}"}, "a majority") for share in (0, 0.5, "x")),
        ({"federation.robust": "krum"}, "multi-krum:SHARE"),
        ({"federation.robust": "median:0.2"}, "multi-krum:SHARE"),
    ],
)
def test_robust_rules_are_refused_where_they_would_not_mean_what_they_say(values, words):
    with pytest.raises(InputError, match=words):
        config.from_flat(values)


def test_overrides_win_over_the_file_and_read_as_text(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[privacy]\nepsilon = 3.0\n")
    overrides = config.parse_overrides(["privacy.epsilon=inf", "adapter.target-modules=a,b"])
    resolved = config.load(file, overrides)
    assert resolved.privacy.epsilon == math.inf
    assert resolved.adapter.target_modules == ("a", "b")
    with pytest.raises(InputError, match="--set KEY=VALUE"):
        config.parse_overrides(["privacy.epsilon"])


def test_files_that_are_missing_or_not_toml_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read the config"):
        config.load(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("= 3")
    with pytest.raises(InputError, match="not valid TOML"):
        config.load(broken)
    with pytest.raises(InputError, match=r"holds records .*`fedlora init .*rows\.csv` writes"):
        config.load(tmp_path / "rows.csv")


def test_the_fingerprint_ignores_where_a_run_runs_and_nothing_else():
    made = config.RunConfig()
    moved = made.replace({"run-dir": "/elsewhere", "tracking.callbacks": "a:b"})
    assert moved.fingerprint() == made.fingerprint()
    for key, value in (("seed", 2), ("privacy.noise", "seeded"), ("federation.rounds", 3)):
        assert made.replace({key: value}).fingerprint() != made.fingerprint()


SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 3,
    "privacy.delta": 1e-5,
    "training.batch-size": 0.2,
    "federation.weighting": "public-size",
}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"privacy.honest": 0}, "privacy.honest is 0, .* at least 2"),
        ({"privacy.honest": 1}, "privacy.honest is 1, .* at least 2"),
        ({"privacy.epsilon": math.inf}, "privacy.epsilon is inf, .* give a budget"),
        *(
            ({"federation.strategy": name}, f"{name!r}, .* use fedavg, ffa, rolora$")
            for name in ("svd", "stack", "exact", "fedsa", "fedsvd")
        ),
        ({"training.local-steps": 2}, "local-steps is 2, .* one step.* set it to 1"),
        ({"training.optimizer": "adam"}, "optimizer is 'adam', .* set it to 'sgd'"),
        ({"training.proximal": 0.1}, "proximal is 0.1, .* set it to 0"),
        ({"federation.weighting": "uniform"}, "weighting is 'uniform', .* set it to 'public-size'"),
        ({"federation.institutions-per-round": 3}, "institutions-per-round is 3, .* all inst"),
        ({"federation.robust": "median"}, "robust is 'median', .* no single update"),
        ({"privacy.institution-epsilon": 3.0}, "institution-epsilon"),
        ({"training.batch-size": 64}, "batch-size is 64, .* a share"),
        ({"privacy.delta": 0.0}, "privacy.delta is 0, .* give a delta"),
    ],
)
def test_what_does_not_go_with_secure_aggregation_is_refused_with_the_reason(values, words):
    config.from_flat(SECURE)
    with pytest.raises(InputError, match=words):
        config.from_flat(SECURE | values)


@pytest.mark.parametrize(("institutions", "rounds"), [(1000, 120), (9999, 12), (12, 10_000)])
def test_more_shares_of_keys_than_one_message_holds_are_refused_in_a_deployment(
    institutions, rounds
):
    of = {"data.institutions": institutions, "federation.rounds": rounds}
    deployed = {"data.source": "institutions", "data.labels": "a,b"}
    config.from_flat(SECURE | deployed | of)
    more = of | {"data.institutions": institutions + 1, "federation.rounds": rounds + 1}
    config.from_flat(SECURE | more)
    words = f"institutions is {institutions + 1} and federation.rounds is {rounds + 1}, .* 120000"
    with pytest.raises(InputError, match=words):
        config.from_flat(SECURE | deployed | more)

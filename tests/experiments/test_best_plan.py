"""The search for the plan with the least noise: figures by hand, budgets, refusals."""

import json
import math

import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments import best_plan
from experiments.best_plan import TOLERANCE, search
from fedlora.errors import InputError
from fedlora.privacy import accounting, composition
from fedlora.privacy.composition import Event


@pytest.fixture(autouse=True)
def _few_plans(monkeypatch):
    monkeypatch.setattr(best_plan, "FACTORS", (1, 4))


def marked(rows):
    (best,) = (row for row in rows if row.best)
    return best


def test_noise_of_a_step_and_of_the_sum_are_those_by_hand(tiny_config):
    """Four institutions of 64 units: sigma sqrt(K) / (q N), and that over the root of the steps."""
    config = tiny_config(**{"training.local-steps": 2, "federation.rounds": 8})
    rows = search(config, compute=None, units=[64] * 4)
    assert [row.rounds for row in rows if row.configured] == [8]
    for row in rows:
        sigma = accounting.noise_multiplier(
            epsilon=8.0,
            delta=1e-4,
            sample_rate=row.sample_rate,
            steps=2 * row.rounds,
        )
        noise = sigma * math.sqrt(4) / (row.sample_rate * 256)
        assert row.noise_multiplier == pytest.approx(sigma)
        assert row.noise == pytest.approx(noise)
        assert row.noise_of_sum == pytest.approx(noise / math.sqrt(2 * row.rounds))
        assert row.records == pytest.approx(2 * row.rounds * row.sample_rate * 256, abs=1)


def test_every_plan_keeps_budget_and_compute_and_the_best_is_near_the_least(tiny_config):
    config = tiny_config(**{"federation.rounds": 24, "privacy.epsilon": 2.0})
    for compute in (None, 5000, 100):
        rows = search(config, compute=compute, units=[64] * 4)
        for row in rows:
            event = Event(
                noise_multiplier=row.noise_multiplier,
                sample_rate=row.sample_rate,
                steps=row.rounds,
            )
            assert composition.epsilon((event,), 1e-4, "prv") <= 2.0
            assert row.records <= (compute or 24 * 64)
        least = min(row.noise_of_sum for row in rows)
        close = [row for row in rows if row.noise_of_sum <= (1 + TOLERANCE) * least]
        assert marked(rows).rounds == max(row.rounds for row in close)
    # 100 of 256 records: no round has rate 1, and the configuration's own plan needs more
    assert not any(row.configured or row.sample_rate == 1 for row in rows)


def test_where_the_compute_lasts_for_whole_rounds_rate_one_is_among_the_plans(tiny_config):
    rows = search(tiny_config(), compute=2 * 256 + 100, units=[64] * 4)
    assert (rows[0].rounds, rows[0].sample_rate, rows[0].records) == (2, 1.0, 512)


def test_the_configuration_s_plan_replaces_no_better_one_of_as_many_rounds(tiny_config):
    config = tiny_config(**{"federation.rounds": 8, "training.sample-rate": 0.25})
    rows = search(config, compute=8 * 256, units=[64] * 4)
    eight = [(row.sample_rate, row.configured) for row in rows if row.rounds == 8]
    assert sorted(eight) == [(0.25, True), (1.0, False)]
    same = search(config, compute=None, units=[64] * 4)
    assert [row.configured for row in same if row.rounds == 8] == [True]


def test_all_records_in_each_step_give_the_same_noise_of_the_sum_for_any_rounds(tiny_config):
    """Gaussian mechanisms without sampling compose exactly: sigma grows as the root of the steps.

    The search for the noise ends within 0.1 %.
    """
    found = []
    for rounds in (1, 4, 16):
        config = tiny_config(**{"federation.rounds": rounds, "training.sample-rate": 1.0})
        row = best_plan._row(config, [64] * 4)
        found.append(row.noise_of_sum)
    assert found == pytest.approx([found[0]] * 3, rel=2e-3)


@pytest.mark.parametrize("weighting", ["uniform", "public-size"])
def test_institutions_of_different_size_count_by_their_weight(tiny_config, weighting):
    """Units 48 and 256: size classes 32 and 256, which divide the two noisy sums."""
    config = tiny_config(**{"federation.weighting": weighting})
    row = best_plan._row(config, [48, 256])
    sigma, rate = row.noise_multiplier, 0.25
    shares = (0.5, 0.5) if weighting == "uniform" else (32 / 288, 256 / 288)
    noise = math.hypot(shares[0] * sigma / (rate * 32), shares[1] * sigma / (rate * 256))
    length = shares[0] * 48 / 32 + shares[1] * 256 / 256
    assert row.noise == pytest.approx(noise / length)
    if weighting == "public-size":
        assert row.noise == pytest.approx(sigma * math.sqrt(2) / (rate * 304))


def test_with_a_sample_of_institutions_each_plans_for_its_share_of_the_rounds(tiny_config):
    config = tiny_config(**{"federation.institutions-per-round": 1, "federation.rounds": 8})
    row = best_plan._row(config, [64] * 4)
    sigma = accounting.noise_multiplier(epsilon=8.0, delta=1e-4, sample_rate=0.25, steps=2)
    assert row.noise_multiplier == pytest.approx(sigma)
    assert row.noise == pytest.approx(sigma / (0.25 * 64))
    assert row.records == 8 * 16


def test_a_batch_size_is_counted_by_the_size_class(tiny_config):
    batch = {"training.sample-rate": 0.0, "training.batch-size": 32}
    row = best_plan._row(tiny_config(**batch), [96] * 4)
    assert row.sample_rate == pytest.approx(32 / 64)  # of the size class 64
    assert row.records == 3 * 4 * 48


@pytest.mark.parametrize(
    ("values", "compute", "words"),
    [
        ({"privacy.epsilon": math.inf}, None, "privacy.epsilon is inf, so there is no noise"),
        ({"privacy.institution-epsilon": 3.0}, None, "does not count the server's noise"),
        ({}, 0, "--compute is 0; it must be at least 1"),
        (
            {
                "privacy.trust": "secure-aggregation",
                "privacy.honest": 5,
                "privacy.colluding": 1,
                "federation.weighting": "public-size",
            },
            None,
            "privacy.honest is 5 and privacy.colluding 1, but only 4 institutions",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(tiny_config, values, compute, words):
    with pytest.raises(InputError) as refused:
        search(tiny_config(**values), compute=compute, units=[64] * 4)
    assert words in str(refused.value)


def test_compute_for_less_than_the_least_rate_is_refused(tiny_config):
    with pytest.raises(InputError, match="--compute is 1, less than a millionth"):
        search(tiny_config(**{"privacy.delta": 0.0}), compute=1, units=[2**20])


def test_units_are_those_of_the_data_or_of_the_command_line(tiny_config):
    found = best_plan.units_of(tiny_config(), None)
    assert len(found) == 4 and 80 < min(found) <= max(found) <= 120
    with pytest.raises(InputError, match="names records of its own"):
        best_plan.units_of(tiny_config(), 64)
    deployed = {"data.source": "institutions", "data.institutions": 3, "data.labels": "a,b"}
    assert best_plan.units_of(tiny_config(**deployed), 64) == [64] * 3
    with pytest.raises(InputError, match="give --records"):
        best_plan.units_of(tiny_config(**deployed), None)


def test_the_command_prints_the_plans_and_what_they_leave_out(tiny_config, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(tiny_config().to_toml())

    def invoke(*arguments):
        return CliRunner().invoke(app, ["plan", *map(str, arguments)])

    plans = json.loads(invoke("--best", file, "--json").stdout)["plans"]
    assert sum(plan["best"] for plan in plans) == sum(plan["configured"] for plan in plans) == 1
    strict = json.loads(invoke("--best", file, "--set", "privacy.epsilon=1", "--json").stdout)
    assert strict["plans"][0]["noise"] > plans[0]["noise"]
    said = invoke("--best", file).stdout
    assert "best" in said and "which this table does not count" in " ".join(said.split())
    deployed = ["data.source=institutions", "data.institutions=3", "data.labels=a,b"]
    settings = [f"--set={one}" for one in deployed]
    of_demo = json.loads(invoke("--best", "demo", "--records", 640, *settings, "--json").stdout)
    assert [plan["rounds"] for plan in of_demo["plans"] if plan["configured"]] == [30]
    for arguments, words in (
        (("--best", "nothing"), "no ready one has this name"),
        (("--best", file, "--steps", 3), "--steps does not go with --best"),
        (("--best", file, "--table"), "--table does not go with --best"),
        (("--compute", 3), "--compute goes with --best CONFIG only"),
        (
            ("--records", 3),
            "give --records, --steps and --batch-size or --sample-rate, or --best CONFIG",
        ),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2 and words in done.stderr

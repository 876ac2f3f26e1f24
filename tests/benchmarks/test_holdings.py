"""The table by holdings: figures by hand."""

import math

import pytest

from benchmarks import holdings

T = 4.302653  # Student's t, two degrees of freedom


def joining(alone, own, half=0.0):
    mean = own - alone
    gain = {"mean": mean, "low": mean - half, "high": mean + half, "gaining": 1, "losing": 0}
    models = {"alone": alone, "shared": 0.5, "own": own}
    return {
        **{name: {"accuracy": value, "macro_f1": value} for name, value in models.items()},
        "gain": gain,
        "gain_macro_f1": gain,
        "institutions": {"Alpha": {"keeps_alone": False}},
    }


def halves(text):
    return float(text.partition("± ")[2].partition(" ")[0])


def test_a_setting_has_the_means_of_its_seeds_and_the_interval_of_a_sweep():
    runs = [joining(0.5, 0.6), joining(0.6, 0.62), joining(0.7, 0.73)]
    said = holdings.of_setting(runs, 0.2)
    assert said.startswith("60.0, 50.0, 65.0 | +5.0 ± ")
    spread = math.sqrt((5**2 + 3**2 + 2**2) / 2)  # gains of 10, 2 and 3 points
    assert halves(said) == pytest.approx(T * spread * math.sqrt(1 / 3 + 0.25), abs=0.06)


def test_an_average_is_over_settings_first_and_no_narrower_than_its_runs_own_intervals():
    settings = {
        (40, 4): {
            1: joining(0.5, 0.6, 0.02),
            2: joining(0.5, 0.7, 0.02),
            3: joining(0.5, 0.6, 0.02),
        },
        (80, 4): {
            1: joining(0.5, 0.6, 0.06),
            2: joining(0.5, 0.5, 0.06),
            3: joining(0.5, 0.6, 0.06),
        },
    }
    said = holdings.average(settings, "gain", 0.2)
    assert said.startswith("+10.0 ± ") and said.endswith("(+10.0, +10.0, +10.0)")
    assert halves(said) == pytest.approx(4 * math.sqrt(1 / 3 + 0.25), abs=0.06)
    runs = [run for seeds in settings.values() for run in seeds.values()]
    assert holdings.counts(runs) == "of 6 institutions 6 gain, 0 lose, 0 keep alone"

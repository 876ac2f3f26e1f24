"""What joining gives: figures by hand, intervals against exact ones, refused answers, a run."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from fedlora.data.shards import concatenate
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.runs.comparison import _over_alone, summary, text_numbers
from fedlora.runs.joining_verdict import Outcome, comparison, outcome, verdict
from fedlora.wire import wire
from fedlora.wire.messages import EvaluateOrder, Evaluation
from server import answers, joining
from server.population import population_of
from simulation import progress
from simulation.engines.inline import InlineGrid
from tests.samples import compared_rows

LABELS = ("loan", "card", "fraud")


def by_counts(better: int, worse: int, same: int):
    """Rows on which own alone is right, alone alone is right, and both are right."""
    n = better + worse + same
    return compared_rows(
        truth=[0] * n,
        alone=[1] * better + [0] * worse + [0] * same,
        shared=[1] * n,
        own=[0] * better + [1] * worse + [0] * same,
    )


TWO = {
    # Alpha: 8 rows; alone 4 right, shared 3, own 6.
    "Alpha": compared_rows(
        records=100,
        truth=[0, 0, 0, 0, 1, 1, 2, 2],
        alone=[0, 0, 1, 1, 1, 1, 0, 0],
        shared=[0, 0, 0, 1, 0, 0, 0, 0],
        own=[0, 0, 0, 1, 1, 1, 2, 0],
        known=[9] * 6 + [0, 5],
    ),
    # Beta: 2 rows; alone 2 right, shared 1, own 1.
    "Beta": compared_rows(records=30, truth=[0, 2], alone=[0, 2], shared=[0, 0], own=[0, 0]),
}


def test_accuracies_and_gain_are_those_by_hand() -> None:
    found = summary(TWO, LABELS)
    assert [found[model]["accuracy"] for model in ("alone", "shared", "own")] == [0.6, 0.4, 0.7]
    assert found["gain"]["mean"] == pytest.approx(0.1)
    assert found["gain_shared"]["mean"] == pytest.approx(-0.2)
    alpha, beta = found["institutions"]["Alpha"], found["institutions"]["Beta"]
    assert (alpha["alone"], alpha["shared"], alpha["own"]) == (0.5, 0.375, 0.75)
    assert (alpha["records"], alpha["rows"], alpha["gain"]) == (100, 8, 0.25)
    assert (beta["alone"], beta["shared"], beta["own"], beta["gain"]) == (1.0, 0.5, 0.5, -0.5)
    assert (alpha["alone_steps"], alpha["own_steps"], alpha["weight"]) == (8, 4, 0.5)


def test_macro_f1_is_the_mean_over_classes_by_hand() -> None:
    # Own: loan 4 of 5 with 3 others called loan; card 2 of 2 and 1 other; fraud 1 of 3.
    f1 = [2 * 4 / (5 + 6), 2 * 2 / (2 + 3), 2 * 1 / (3 + 1)]
    assert summary(TWO, LABELS)["own"]["macro_f1"] == pytest.approx(sum(f1) / 3)


def test_the_shared_model_has_the_interval_of_its_own_predictions() -> None:
    """As own's, were it own; nothing of own is in it."""
    rows = by_counts(20, 5, 75)  # shared is right on none, alone on 80
    as_own = dataclasses.replace(
        rows, predicted={**rows.predicted, "own": rows.predicted["shared"]}
    )
    found, expected = summary({"A": rows}, LABELS)["gain_shared"], summary({"A": as_own}, LABELS)
    assert found == {key: expected["gain"][key] for key in ("mean", "low", "high", "texts")}
    assert found["mean"] == pytest.approx(-0.8)
    assert summary({"A": rows}, LABELS)["gain"]["mean"] == pytest.approx(0.15)


def test_new_and_few_kinds_are_those_of_which_the_institution_has_no_or_few_records() -> None:
    found = summary(TWO, LABELS)
    new, few = found["new"], found["few"]
    assert [new[key] for key in ("rows", "texts", "alone", "shared", "own")] == [1, 1, 0, 0, 1]
    assert (new["gain"], new["low"], new["high"]) == (1.0, 1.0, 1.0)
    assert [few[key] for key in ("rows", "texts", "alone", "shared", "own")] == [1, 1, 0, 0, 0]
    assert summary({"Beta": TWO["Beta"]}, LABELS)["new"] == {"rows": 0}


def test_without_institutions_there_is_nothing_to_say() -> None:
    assert summary({}, LABELS) == {}
    assert comparison({}) is None and comparison({"joining": {"seconds": 1.0}}) is None


def test_the_interval_is_that_of_the_exact_bootstrap() -> None:
    """With 30 of 100 rows better and none worse, the resampled gain is Binomial(100, 0.3) / 100.

    Its quantiles at 2.5 and 97.5 % are 21 and 39. That 4,000 resamples miss either by more than one
    row has probability below 1e-9; the resampling has a fixed seed besides.
    """
    found = summary({"A": by_counts(30, 0, 70)}, LABELS)["gain"]
    assert abs(100 * found["low"] - 21) <= 1 and abs(100 * found["high"] - 39) <= 1
    assert found["mean"] == pytest.approx(0.3)


def test_a_gain_on_every_row_has_no_uncertainty() -> None:
    found = summary({"A": by_counts(9, 0, 0)}, LABELS)["gain"]
    assert (found["low"], found["high"]) == (1.0, 1.0)


def test_rows_are_drawn_from_all_institutions_together() -> None:
    """With one row each, rows drawn within institutions would be the same in every resample.

    The number of six gaining rows of ten is Binomial(10, 0.6) in a resample, with quantiles 3 and 9
    at 2.5 and 97.5 %: gains of -0.4 and 0.8.
    """
    rows = {f"A{i}": by_counts(1, 0, 0) for i in range(6)}
    rows |= {f"B{i}": by_counts(0, 1, 0) for i in range(4)}
    found = summary(rows, LABELS)["gain"]
    assert (found["low"], found["high"]) == (pytest.approx(-0.4), pytest.approx(0.8))
    assert found["mean"] == pytest.approx(0.2)


@pytest.mark.parametrize("copies", [1, 3])
def test_an_institution_of_fewer_than_ten_texts_neither_gains_nor_loses(copies) -> None:
    def rows(texts: int, own: int):
        n = copies * texts
        numbers = [text for text in range(texts) for _ in range(copies)]
        return compared_rows([0] * n, [1 - own] * n, [0] * n, [own] * n, texts=numbers)

    many = {"A": rows(10, own=0), "B": rows(10, own=1)}
    few = {"C": rows(9, own=0), "D": rows(9, own=1), "E": rows(1, own=0)}
    found = summary(many | few, LABELS)
    assert (found["gain"]["gaining"], found["gain"]["losing"]) == (1, 1)
    assert [found["institutions"][name]["texts"] for name in "ACE"] == [10, 9, 1]


def test_of_fewer_than_ten_texts_nothing_is_concluded() -> None:
    """Own is right on all rows and alone on none, so that all bootstraps agree."""
    found = summary({"A": by_counts(9, 0, 0)}, LABELS)
    assert outcome(found) is Outcome.UNCLEAR
    assert outcome(summary({"A": by_counts(10, 0, 0)}, LABELS)) is Outcome.GAIN


def test_intervals_hold_the_true_gain_as_often_as_they_say() -> None:
    """600 samples of 200 rows with a true gain of 0.1; nominal coverage 95 %.

    The bootstrap of 200 rows covers 94 to 95.5 %. Fewer than 91 % or more than 98.5 % of 600 have
    probability below 2e-3 at a coverage of 94 %, and the seed is fixed.
    """
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(600):
        better, worse, same = draw.multinomial(200, [0.2, 0.1, 0.7])
        rows = by_counts(int(better), int(worse), int(same))
        gain = _over_alone([rows], "own")
        held += gain["low"] <= 0.1 <= gain["high"]
    assert 0.91 <= held / 600 <= 0.985


def test_rows_of_one_text_are_drawn_together() -> None:
    """40 texts of 5 rows each, at five institutions; a text gains on all of its rows or on none.

    The number of gaining texts is Binomial(40, 0.25) in a resample, so that the interval is that of
    40 rows and not of 200: 5 and 16 of 40 texts. That 4,000 resamples miss either by more than one
    has probability below 1e-9; the resampling has a fixed seed besides.
    """
    gains = [1] * 10 + [0] * 30
    found = {
        name: compared_rows(
            truth=[0] * 40,
            alone=gains,
            shared=[0] * 40,
            own=[0] * 40,
            texts=list(range(40)),
        )
        for name in "ABCDE"
    }
    gain = summary(found, LABELS)["gain"]
    assert gain["mean"] == pytest.approx(0.25)
    assert abs(40 * gain["low"] - 5) <= 1 and abs(40 * gain["high"] - 16) <= 1


def test_texts_are_numbered_by_their_tokens(tiny_config) -> None:
    held_out = population_of(tiny_config()).held_out
    assert held_out is not None
    twice = concatenate([held_out, held_out])
    numbers = text_numbers(twice)
    for i, j in itertools.combinations(range(len(twice)), 2):
        assert (numbers[i] == numbers[j]) == (twice.row(i).tolist() == twice.row(j).tolist())


@pytest.mark.parametrize(
    ("counts", "said", "expected"),
    [
        ((30, 5, 65), "Joining pays", Outcome.GAIN),
        ((5, 5, 90), "no difference", Outcome.UNCLEAR),
        ((5, 30, 65), "does not pay", Outcome.LOSS),
    ],
)
def test_the_verdict_follows_the_interval(counts, said, expected) -> None:
    found = summary({"A": by_counts(*counts)}, LABELS)
    assert outcome(found) is expected
    assert said in verdict(found) and f"{counts[0] - counts[1]:+.1f} points" in verdict(found)
    gains, loses = int(expected is Outcome.GAIN), int(expected is Outcome.LOSS)
    assert (found["gain"]["gaining"], found["gain"]["losing"]) == (gains, loses)


def printed(result, population=1) -> str:
    table = Table(show_header=False)
    progress.add_joining(table, {"population": population, **result})
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.fixture
def beta(tiny_config):
    """Config, population and an honest answer of Beta."""
    config = tiny_config(**{"home.method": "interpolate"})
    population = population_of(config)
    assert population.owner is not None
    n = int((population.owner == population.names.index("Beta")).sum())
    honest = {model: [0] * n for model in ("alone", "shared", "own")}
    return config, population, honest | {"alone_steps": 8, "own_steps": 8, "weight": 1.0}


def test_an_honest_answer_is_measured_against_the_institutions_own_rows(beta) -> None:
    config, population, honest = beta
    answer = Evaluation(institution="Beta", metrics=honest)
    rows = joining._rows("Beta", answer, config, population, text_numbers(population.held_out))
    index = population.names.index("Beta")
    assert rows.truth.tolist() == population.held_out.targets[population.owner == index].tolist()
    assert rows.predicted["own"].tolist() == honest["own"] and (rows.known > 5).all()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda said: said.pop("own"), "invalid-metrics"),
        (lambda said: said["own"].pop(), "invalid-metrics"),
        (lambda said: said["alone"].append(0), "invalid-metrics"),
        (lambda said: said["own"].__setitem__(0, 3), "invalid-metrics"),
        (lambda said: said["own"].__setitem__(0, -1), "invalid-metrics"),
        (lambda said: said["own"].__setitem__(0, True), "invalid-metrics"),
        (lambda said: said["own"].__setitem__(0, 1.0), "invalid-metrics"),
        (lambda said: said.update(own="000"), "invalid-metrics"),
    ],
)
def test_impossible_answers_are_refused(beta, change, code) -> None:
    config, population, honest = beta
    change(honest)
    with pytest.raises(Refusal) as refused:
        answer = Evaluation(institution="Beta", metrics=honest)
        joining._rows("Beta", answer, config, population, text_numbers(population.held_out))
    assert refused.value.code == code


def test_an_answer_of_another_institution_is_refused(beta, monkeypatch) -> None:
    config, population, honest = beta
    reply = wire.pack_evaluation(Evaluation(institution="Beta", metrics=honest))
    monkeypatch.setattr(answers, "exchange", lambda *_: iter([(1, reply), (2, reply)]))
    monkeypatch.setattr(answers, "content", lambda reply: reply)
    order = EvaluateOrder(run="a1", round=3, save=True, adapter=AdapterState({}))
    nodes = {1: "Alpha", 2: "Beta"}
    found = joining.measure(InlineGrid(ClientApp(), 2, {}), order, nodes, config, population)
    assert found["not_compared"] == {"Alpha": "wrong-institution"}
    assert list(found["institutions"]) == ["Beta"]


def test_a_run_compares_the_models_and_each_institution_keeps_its_own(
    tiny_config, simulate_run
) -> None:
    config = tiny_config(**{"home.method": "interpolate", "home.steps": 8, "federation.rounds": 1})
    result = simulate_run(config)
    found = result["joining"]
    assert list(found["institutions"]) == ["Alpha", "Beta", "Delta", "Gamma"]
    assert sum(of["rows"] for of in found["institutions"].values()) == result["n"]
    assert found["shared"]["accuracy"] == result["accuracy"]
    assert found["own"]["accuracy"] - found["alone"]["accuracy"] == pytest.approx(
        found["gain"]["mean"]
    )
    run = Path(config.run_dir)
    for name, of in found["institutions"].items():
        own = run / "institutions" / name / "own"
        assert "must not leave" in " ".join((own / "README.md").read_text().split())
        assert list(AdapterState.open(own)) == list(AdapterState.open(run / "adapter"))
        assert of["shared"] == result["institutions"][name]
    assert json.dumps(result) and math.isfinite(found["seconds"])

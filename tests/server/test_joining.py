"""What joining gives: figures by hand, intervals against exact ones, refused answers, a run."""

import dataclasses
import itertools
import json
import math
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from fedlora.data.shards import concatenate
from fedlora.errors import Refusal
from fedlora.models import metrics
from fedlora.models.adapters import AdapterState
from fedlora.runs import comparison as comparison_module
from fedlora.runs.comparison import _interval, summary, text_numbers
from fedlora.runs.joining_verdict import Outcome, comparison, outcome, verdict
from fedlora.terminal import Terminal
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
        scarce=[False] * 6 + [True] * 2,
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


def test_the_gain_in_macro_f1_has_the_interval_of_a_bootstrap_by_hand() -> None:
    """Two ways to draw the same: texts one by one here, kinds of texts at once there.

    Each end of an interval is a quantile of 4,000 draws, with a standard error of some 0.004; that
    two ends differ by 0.03 has probability below 1e-5, and the seeds are fixed.
    """
    draw = np.random.default_rng(11)
    truth = draw.choice(3, 60, p=[0.6, 0.3, 0.1])
    said = {
        model: np.where(draw.random(60) < right, truth, draw.integers(0, 3, 60))
        for model, right in (("alone", 0.5), ("own", 0.7))
    }
    texts = np.arange(60) // 2  # pairs of rows of one text
    rows = compared_rows(
        truth=truth.tolist(),
        alone=said["alone"].tolist(),
        shared=[0] * 60,
        own=said["own"].tolist(),
        texts=texts.tolist(),
    )

    def gain(which):
        one, other = ([LABELS[i] for i in said[model][which]] for model in ("alone", "own"))
        true = [LABELS[i] for i in truth[which]]
        return metrics.macro_f1(true, other) - metrics.macro_f1(true, one)

    found = summary({"A": rows}, LABELS)["gain_macro_f1"]
    assert found["mean"] == pytest.approx(gain(np.arange(60)))
    drawn = []
    for _ in range(4000):
        chosen = draw.integers(0, 30, 30)
        drawn.append(gain(np.stack([2 * chosen, 2 * chosen + 1]).ravel()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert high - low > 0.2
    assert (found["low"], found["high"]) == (
        pytest.approx(low, abs=0.03),
        pytest.approx(high, abs=0.03),
    )


def _random_rows(draw, rows, classes, texts):
    """Rows of several classes on which own is more often right than alone."""
    truth = draw.integers(0, classes, rows)
    said = {
        model: np.where(draw.random(rows) < right, truth, draw.integers(0, classes, rows)).tolist()
        for model, right in (("alone", 0.5), ("own", 0.7))
    }
    return compared_rows(
        truth=truth.tolist(),
        shared=[0] * rows,
        texts=draw.integers(0, texts, rows).tolist(),
        **said,
    )


def test_the_interval_of_macro_f1_is_to_the_last_bit_that_of_a_full_table() -> None:
    draw = np.random.default_rng(5)
    group = [_random_rows(draw, rows, 7, 60) for rows in (50, 41)]
    truth = np.concatenate([rows.truth for rows in group])
    alone, own = (np.concatenate([rows.predicted[m] for rows in group]) for m in ("alone", "own"))
    every = np.arange(9)[:, None]  # two classes have no row
    columns = [truth, alone, own, np.where(alone == truth, truth, -1)]
    columns.append(np.where(own == truth, truth, -1))
    table = np.concatenate([column == every for column in columns]).astype(np.int64)
    one, other = comparison_module._macro_f1(comparison_module._resampled(group, table), 9)
    expected = comparison_module._middle(other - one)
    assert comparison_module._macro_f1_interval(group, 9) == expected


def test_the_interval_of_macro_f1_needs_no_table_of_all_classes_and_texts() -> None:
    """Such a table has 5 x 300 x 1,500 numbers, 18 MB, and its draws have 4,000 x 1,500."""
    group = [_random_rows(np.random.default_rng(6), 1500, 300, 1400)]
    tracemalloc.start()
    try:
        low, high = comparison_module._macro_f1_interval(group, 300)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < low < high and most < 9e6


def test_scarce_rows_are_those_of_classes_that_their_institution_has_little_of() -> None:
    scarce = summary(TWO, LABELS)["scarce"]
    low, high = scarce.pop("low"), scarce.pop("high")
    assert scarce == {
        "rows": 2, "texts": 2, "alone": 0.0, "shared": 0.0, "own": 0.5, "gain": 0.5
    }  # fmt: skip
    assert (low, high) == (0.0, 1.0)  # one of two rows becomes right
    assert summary({"Beta": TWO["Beta"]}, LABELS)["scarce"] == {"rows": 0}


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
    assert "(3 with fewer than 10 different held-out texts count as neither)" in verdict(found)
    assert "neither" not in verdict(summary(many, LABELS))
    assert "(1 with fewer than 10 different held-out texts counts as neither)" in verdict(
        summary(many | {"C": few["C"]}, LABELS)
    )


def test_of_fewer_than_ten_texts_nothing_is_concluded() -> None:
    """Own is right on all rows and alone on none, so that all bootstraps agree."""
    found = summary({"A": by_counts(9, 0, 0)}, LABELS)
    assert outcome(found) is Outcome.UNCLEAR
    said = "(+100.0 points, without an interval: 9 different held-out texts are too few)"
    assert said in verdict(found)
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
        low, high = _interval([rows])
        held += low <= 0.1 <= high
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
    sentence = verdict(found)
    assert said in sentence and f"{counts[0] - counts[1]:+.1f} points" in sentence
    gains, loses = int(expected is Outcome.GAIN), int(expected is Outcome.LOSS)
    said = f"{gains} gain{'s' * gains} and {loses} lose{'s' * loses} by more"
    assert f"of 1 institution {said}" in sentence


def printed(result, population=1) -> str:
    table = Table(show_header=False)
    progress.add_joining(table, {"population": population, **result})
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_progress_says_that_institutions_train_at_home(tiny_config) -> None:
    records = [{"seconds": 1.0, "metrics": {"accuracy": 0.5}, "epsilon_max": 1.0}] * 3
    said = progress.describe(tiny_config(), records, 12, 39, 60.0, 3, at_home=True)
    assert said == "models at home: institutions 12/39 (60 s)"
    assert "at home" not in progress.describe(tiny_config(), records, 12, 39, 60.0, 3)
    for homes in (True, False):
        said = progress.describe(tiny_config(), records[:2], 0, 39, 60.0, 2, homes=homes)
        assert said.endswith("1 s left" + " for the rounds, then models at home" * homes)


def test_a_grid_tells_the_type_of_the_messages_that_it_carries() -> None:
    grid = InlineGrid(ClientApp(), 2, {})
    assert grid.pushed_type == ""
    orders = [grid.create_message(RecordDict(), wire.HOME, node, "home") for node in (1, 2)]
    grid.push_messages(orders)
    assert (grid.pushed_type, grid.pushed, grid.answered) == (wire.HOME, 2, 0)


def test_a_log_has_a_line_for_each_tenth_that_has_trained_at_home(tiny_config, tmp_path) -> None:
    file = tmp_path / "log"
    grid = InlineGrid(ClientApp(), 39, {})
    grid.pushed_type, grid.pushed, grid.answered = wire.HOME, 39, 0
    with file.open("w") as stream:
        console = Terminal()
        console.file = stream
        with progress.progress(tiny_config(), grid, console):
            for lines, answered in ((1, 2), (1, 3), (2, 7), (3, 8)):
                deadline = time.monotonic() + 60
                while len(file.read_text().splitlines()) < lines and time.monotonic() < deadline:
                    stream.flush()
                    time.sleep(0.05)
                time.sleep(0.8)  # three more looks
                grid.answered = answered
            time.sleep(0.8)
    assert [line.split(" (")[0] for line in file.read_text().splitlines()] == [
        f"models at home: institutions {answered}/39" for answered in (0, 3, 7)
    ]


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
    assert rows.predicted["own"].tolist() == honest["own"] and not rows.scarce.any()


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
    found = joining.measure(None, order, nodes, config, population)
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


def test_classes_with_few_texts_are_counted_by_different_texts() -> None:
    """Class 0 has eight texts; class 1 six rows of four texts, class 2 none, but a model names it.

    Nothing is of class 3, and nothing is named so: it is no part of macro-F1.
    """
    truth, texts = [0] * 8 + [1] * 6, [*range(8), 8, 9, 10, 11, 11, 11]
    labels = (*LABELS, "other")
    rows = compared_rows(truth, truth, truth, truth, texts=texts)
    named = compared_rows([0], [0], [3], [2], texts=[0])
    few = [summary(found, labels)["gain_macro_f1"]["classes_with_few_texts"]
           for found in ({"A": rows}, {"A": rows, "B": named})]  # fmt: skip
    assert few == [1, 2]

"""Classification metrics without scikit-learn: one definition for every task."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def accuracy(truth: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Share of rows with a right prediction, in [0, 1]; nan without rows."""
    if not truth:
        return float("nan")
    return sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)


def macro_f1(truth: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Mean F1 over the classes that occur in truth or prediction, in [0, 1]; nan without rows.

    The same as scikit-learn's ``f1_score(average="macro")``. ``None`` is no class: it lowers the
    recall of the true class and the precision of none.
    """
    return _mean_f1(per_class(truth, predicted))


def _mean_f1(classes: Mapping[str, Mapping[str, int]]) -> float:
    f1 = [
        2 * counts["correct"] / rows
        for counts in classes.values()
        if (rows := counts["truth"] + counts["predicted"])
    ]
    return sum(f1) / len(f1) if f1 else float("nan")


def per_class(
    truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str] = ()
) -> dict[str, dict[str, int]]:
    """Rows by class.

    Args:
        truth: The class of each row.
        predicted: The predicted class of each row; ``None`` where the model named no class.
        labels: Classes to list first, in this order, even when no row has them.

    Returns:
        For each class in ``labels`` or in the rows: the numbers of rows of the class (``truth``),
        of predictions of it (``predicted``), and of right predictions of it (``correct``).
    """
    is_it, said, right = Counter(truth), Counter(predicted), Counter[str]()
    right.update(t for t, p in zip(truth, predicted, strict=True) if t == p)
    found = {name for name in (*is_it, *said) if name is not None} - set(labels)
    return {
        name: {"truth": is_it[name], "predicted": said[name], "correct": right[name]}
        for name in (*labels, *sorted(found))
    }


def classes_of(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
    """The `per_class` of a result; empty for sft, whose rows have references and no classes."""
    return {} if "token_loss" in result else result.get("per_class", {})


def majority(classes: Mapping[str, Mapping[str, int]]) -> tuple[str, float]:
    """The baseline for accuracy: the most frequent class, and its share of the rows.

    Args:
        classes: The result of `per_class` for at least one row.
    """
    name = max(classes, key=lambda name: classes[name]["truth"])
    return name, classes[name]["truth"] / sum(counts["truth"] for counts in classes.values())


def majority_macro_f1(classes: Mapping[str, Mapping[str, int]]) -> float:
    """The macro-F1 of always answering the most frequent class: its recall is 1, all others' 0.

    Args:
        classes: The result of `per_class` for at least one row.
    """
    _, share = majority(classes)
    return 2 * share / (1 + share) / occurring(classes)


def occurring(classes: Mapping[str, Mapping[str, int]]) -> int:
    """The number of classes that rows are of.

    Args:
        classes: The result of `per_class`.
    """
    return sum(counts["truth"] > 0 for counts in classes.values())


def only_prediction(classes: Mapping[str, Mapping[str, int]]) -> str | None:
    """The only class that is predicted for rows of several; None if there are more, or one class.

    Args:
        classes: The result of `per_class`.
    """
    said = [name for name, counts in classes.items() if counts["predicted"]]
    return said[0] if len(said) == 1 and occurring(classes) > 1 else None


def classification(
    truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> dict[str, Any]:
    """``n``, ``accuracy``, ``macro_f1`` and ``per_class`` in one dictionary that JSON can hold."""
    return {
        "n": len(truth),
        "accuracy": accuracy(truth, predicted),
        "macro_f1": macro_f1(truth, predicted),
        "per_class": per_class(truth, predicted, labels),
    }


def _mean(results: Sequence[Mapping[str, Any]], key: str, weight: str) -> float:
    # JSON has null and "inf" for figures that are not finite
    values = [math.nan if r[key] is None else float(r[key]) for r in results]
    weights = [r[weight] for r in results]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def pooled(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics over the rows of several evaluations.

    Args:
        results: Results of `fedlora.models.tasks.Task.evaluate`, all of one task.

    Returns:
        The same keys, over all rows; an empty dictionary without results. For sft, each evaluation
        compared answers with its own references, and generated answers for a part of its rows.
    """
    if not results:
        return {}

    def total(key: str) -> int:
        return sum(r[key] for r in results)

    result: dict[str, Any] = {"n": total("n")}
    if all("tokens" in r for r in results):
        loss = _mean(results, "token_loss", "tokens")
        result |= {
            "tokens": total("tokens"),
            "token_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "exact_match": _mean(results, "exact_match", "generated"),
            "generated": total("generated"),
        }
    if all("per_class" in r for r in results):
        rows = "generated" if "generated" in result else "n"
        classes: dict[str, dict[str, int]] = {}
        for r in results:
            for name, counts in r["per_class"].items():
                mine = classes.setdefault(name, dict.fromkeys(counts, 0))
                for key, count in counts.items():
                    mine[key] += count
        result |= {
            "accuracy": _mean(results, "accuracy", rows),
            "macro_f1": _mean_f1(classes),
            "per_class": classes,
        }
        if all("unparseable" in r for r in results):
            result["unparseable"] = total("unparseable")
    if all("loss" in r for r in results):
        result["loss"] = _mean(results, "loss", "n")
    return result


def leading_answer(text: str, answers: Sequence[str]) -> str | None:
    """Finds the one of the ``answers`` that a generated ``text`` begins with.

    Case, surrounding blanks and any text after the answer's last word are ignored: "Positive."
    gives "positive", but "12.75" does not give "12". If two answers fit, the longer one counts. Any
    other text is unparseable and gives ``None``, never a class.
    """
    said = text.strip().casefold()
    fitting = [
        answer
        for answer in answers
        if said.startswith(answer.casefold())
        and not re.match(r"\w|[.,]\d", said[len(answer.casefold()) :])
    ]
    return max(fitting, key=len, default=None)

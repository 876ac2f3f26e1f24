"""Runs differ by rows more than by texts where a text has many rows."""

import numpy as np
import pytest

from benchmarks import draws


def test_a_text_of_many_rows_counts_once() -> None:
    texts = [0, 0, 0, 1, 2]
    found = np.array([[1, 1, 1, 0, 1], [0, 0, 0, 0, 1]], dtype=float)
    shares = draws.by_text(found, texts)
    assert shares.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert shares.mean(1).tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    said = draws.spread("5 rows", found.mean(1))
    assert said.startswith("by 5 rows: mean 50.0 %, standard deviation 42.4, from 20.0 to 80.0")

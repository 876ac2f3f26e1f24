"""The number of processors in containers and batch jobs."""

import os
from pathlib import Path

import pytest

from fedlora import processors


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sixteen processors of affinity, on a machine with more, and no control group."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    groups = [[tmp_path / file.name for file in files] for files in processors._GROUPS]
    monkeypatch.setattr(processors, "_GROUPS", groups)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", 16),
        ("6400000 100000", 16),
        ("", 16),
    ],
)
def test_a_container_has_as_many_processors_as_its_quota(
    allowed: Path, quota: str, expected: int
) -> None:
    (allowed / "cpu.max").write_text(f"{quota}\n")
    assert processors.count() == expected

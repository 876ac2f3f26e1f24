"""A refused run leaves nothing behind, and its error names the remedy that works."""

import logging

import pytest
from huggingface_hub.utils import _http

from client.ledger import Ledger
from tests.cli.test_main import invoke, refused

INLINE = ("--engine", "inline")


@pytest.fixture
def file(tmp_path, tiny_config):
    path = tmp_path / "x.toml"
    path.write_text(tiny_config(**{"run-dir": "", "federation.rounds": 1}).to_toml())
    return path


def test_a_run_without_budget_leaves_no_directory_and_names_none(file, tmp_path):
    ledgers, out = tmp_path / "ledgers", tmp_path / "out"
    ledgers.mkdir(mode=0o700)
    for name in ("Alpha", "Beta", "Gamma", "Delta"):
        Ledger.create(ledgers / f"{name}.db", max_epsilon=1.0, delta=1e-4, accountant="rdp")
    assign = ("--set", f"privacy.ledger={ledgers}", "--set", "privacy.max-epsilon=20")
    refused(
        "run", file, *assign, "--out", out, *INLINE,
        words=["budget exhausted", "privacy.max-epsilon is for new ledgers"],
    )  # fmt: skip
    assert not out.exists()
    assert "results in" not in invoke("run", file, *assign, "--out", out, *INLINE).output
    out.mkdir()
    (out / "institutions.log").write_text("of the user")
    invoke("run", file, *assign, "--out", out, *INLINE)
    assert (out / "institutions.log").read_text() == "of the user"


def test_a_file_system_without_files_is_no_place_for_a_run(file):
    refused("run", file, "--out", "/proc/x", words=["/proc", "stores no files", "another --out"])


def test_a_sweep_that_cannot_be_written_is_refused_before_anything_runs(file, tmp_path):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(f'base = "{file}"\narms = ["federated"]\n[grid]\nseed = [1]\n')
    out = file / "out"
    refused("sweep", sweep, "--out", out, words=[f"{file} is a file", "give another --out"])


def test_retries_of_the_hubs_client_are_no_lines_of_ours():
    assert not _http.logger.isEnabledFor(logging.WARNING)
    assert _http.logger.isEnabledFor(logging.ERROR)

"""A run's directory, whose server dies at any call that syncs or changes names.

The model is the same run without a death: whatever dies, the run that is continued to its end has
its rounds, its adapter and its statement, to the last bit.
"""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from client.app import app
from fedlora.models.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterState
from fedlora.runs.run_files import alone
from server.rounds import Federation
from server.run_directory import RunDirectory, read_records
from simulation.engines.inline import InlineGrid
from tests.machines.budgets import search, searched
from tests.machines.conftest import BANKS
from tests.machines.lives import Cut, live

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

PRIVATE, PLAIN, KEEPING = "private", "without DP", "keeping a part"
CHANGES = {
    PRIVATE: {},
    PLAIN: {"privacy.epsilon": float("inf"), "federation.server-optimizer": "none"},
    KEEPING: {"federation.strategy": "fedsa"},
}


def serve(config, report=None):
    """A server's life: the run from where it is to its end."""
    with alone(Path(config.run_dir)):
        Federation(InlineGrid(app, len(BANKS), config.flat()), config).run()


def outcome(directory):
    """What a finished run left, without its times and its place."""
    lines = [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_records(directory)
    ]
    result = json.loads((directory / "result.json").read_text())
    privacy = json.loads((directory / "privacy.json").read_text())
    return {
        "rounds": lines,
        "result": {
            k: v for k, v in result.items() if k not in ("seconds", "nonce", "run", "run_dir")
        },
        "privacy": {k: v for k, v in privacy.items() if k not in ("run", "seal")},
        "adapter": (directory / "adapter" / WEIGHTS_FILE).read_bytes(),
    }


def serve_and_say_what_is_synced(config, report):
    """The same; reports the inode and size of each file that is on the disk."""
    fsync = os.fsync

    def told(descriptor):
        fsync(descriptor)
        file = os.fstat(descriptor)
        report((file.st_ino, file.st_size))

    os.fsync = told
    serve(config)


class RunDirectoryMachine(RuleBasedStateMachine):
    """One run, ever new servers."""

    make_config = None
    reference = None

    def __init__(self):
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp())
        self.directory = self.scratch / "run"
        self.synced = {}

    def teardown(self):
        try:
            if self.directory.exists():
                self._ends_as_it_would_have()
        finally:
            shutil.rmtree(self.scratch)

    @initialize(kind=st.sampled_from(list(CHANGES)))
    def begin(self, kind):
        self.kind = kind
        self.config = type(self).make_config(**CHANGES[kind], **{"run-dir": str(self.directory)})

    @rule(number=st.integers(1, 130), lost=st.one_of(st.none(), st.floats(0, 1)))
    def a_server_dies(self, number, lost):
        """A server dies; with ``lost`` its machine does, and loses of what is not synced.

        A run that had ended writes its results again.
        """
        work = functools.partial(serve_and_say_what_is_synced, self.config)
        reports, killed = live(work, Cut("file", number))
        self.synced |= dict(reports)
        if killed and lost is not None:
            self._lose(lost)
        self._whole_or_resumable()

    def _lose(self, share):
        """Cut the unsynced end of each file; ledgers have a machine of their own."""
        for path in self.directory.rglob("*"):
            if path.is_file() and "ledgers" not in path.parts:
                size, synced = path.stat().st_size, self.synced.get(path.stat().st_ino, 0)
                if synced < size:
                    os.truncate(path, synced + int(share * (size - synced)))

    def _whole_or_resumable(self):
        if not self.directory.exists():
            return
        copy = self.scratch / "copy"  # looking for the newest checkpoint cuts the lines back to it
        shutil.copytree(self.directory, copy, ignore=shutil.ignore_patterns("ledgers"))
        try:
            numbers = [line["round"] for line in read_records(copy)]
            assert numbers == list(range(1, len(numbers) + 1))
            state = RunDirectory(copy).latest()
            begun = 0 if state is None else state.round
            assert len(numbers) in (begun, begun + 1)
            assert [line["round"] for line in read_records(copy)] == numbers[:begun]
            reference = self.reference[self.kind]
            for line in copy.joinpath("rounds.jsonl").read_text().splitlines() if state else ():
                line = json.loads(line)
                del line["seconds"]
                assert line == reference["rounds"][line["round"] - 1]
            adapter = copy / "adapter"
            if (adapter / WEIGHTS_FILE).exists():
                assert (adapter / WEIGHTS_FILE).read_bytes() == reference["adapter"]
                AdapterState.open(adapter)
            if (adapter / CONFIG_FILE).exists():
                json.loads((adapter / CONFIG_FILE).read_text())
            if (copy / "result.json").exists():
                assert outcome(copy) == reference
        finally:
            shutil.rmtree(copy)

    def _ends_as_it_would_have(self):
        if not (self.directory / "result.json").exists():
            _, killed = live(functools.partial(serve, self.config))
            assert not killed
        assert outcome(self.directory) == self.reference[self.kind]
        left = [path for path in self.directory.iterdir() if path.name.startswith(".")]
        assert not left or self.synced  # only a death leaves a draft behind


def references(make_config, scratch):
    """Each kind of run as it is when nothing dies."""
    found = {}
    for number, (kind, changes) in enumerate(CHANGES.items()):
        serve(make_config(**changes, **{"run-dir": str(scratch / str(number))}))
        found[kind] = outcome(scratch / str(number))
    return found


@searched(fixed=(3, 4), long=(60, 10))
def test_a_run_whose_server_dies_anywhere_ends_as_it_would_have(budget, make_config, tmp_path):
    world = {"make_config": staticmethod(make_config)}
    reference = references(make_config, tmp_path)
    search(RunDirectoryMachine, budget, **world, reference=reference)

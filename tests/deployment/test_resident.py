"""An institution's base stays in memory from run to run, and is let go when it is another one."""

import contextlib
import shutil

import psutil
import pytest

from deployment import trainer
from tests.deployment.conftest import MODEL, NAMES, PRIVATE, rehearsal

pytestmark = pytest.mark.slow
OTHER = "/models/other"


def _weights(directory, seed):
    """Put other random weights into a model's directory."""
    import torch
    from transformers import BertModel

    torch.manual_seed(seed)
    made = BertModel(BertModel.config_class.from_pretrained(directory, trust_remote_code=False))
    (directory / "model.safetensors").unlink()  # who has it mapped keeps what was in it
    made.save_pretrained(directory)
    for file in (directory, *directory.iterdir()):
        file.chmod(file.stat().st_mode | 0o555)


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_encoder):
    directory = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_encoder, directory)
    _weights(directory, 1)
    return directory


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, complaints, other):
    scratch = tmp_path_factory.mktemp("resident")
    mounted = [f"{other}:{OTHER}:ro"]
    everyone = ["server", *(f"institution-{name}" for name in NAMES)]
    with rehearsal(
        scratch, tiny_encoder, complaints, volumes=dict.fromkeys(everyone, mounted)
    ) as made:
        for name in NAMES:
            made.settings(name, models=[MODEL, OTHER])
        made.up()
        yield made


def _trainers(federation):
    def trains(process):
        with contextlib.suppress(psutil.Error):  # it has just ended
            return process.name() == trainer.TITLE
        return False

    return {
        name: [p.pid for p in federation.processes(f"institution-{name}") if trains(p)]
        for name in NAMES
    }


def test_one_trainer_answers_run_after_run_with_the_base_that_each_names(federation, other):
    federation.until(lambda: all(len(pids) == 1 for pids in _trainers(federation).values()))
    before = _trainers(federation)
    for run, model in (("first", MODEL), ("another", OTHER), ("new-weights", OTHER)):
        if run == "new-weights":
            _weights(other, 2)
        said = federation.submit(run, **PRIVATE, **{"model.name": model})
        assert said["state"] == "completed", said
        assert [r["updates"] for r in federation.rounds(run)] == [3, 3], federation.rounds(run)
    assert _trainers(federation) == before

"""How a run starts."""

import socket
from pathlib import Path

import pytest

from fedlora import processors
from fedlora.errors import InputError
from simulation import run
from simulation.place import placed

SCRIPT = """
import sys
from pathlib import Path
from cli.simulation_commands import _resolve
from simulation import progress, run
config = _resolve(Path(sys.argv[1]), {}, Path(sys.argv[2]), None)
print(len(run.prepare(config).names))
heavy = {"torch", "transformers", "peft", "opacus", "datasets", "pandas", "scipy", "sklearn"}
print(sorted(heavy & set(sys.modules)))
"""


def test_paths_of_a_run_begin_at_the_home_directory_and_not_where_it_starts(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    names = {
        "adapter.start": "earlier",
        "data.source": "banks/*.csv",
        "data.test-source": "rows.csv",
    }
    config = tiny_config(**{key: f"~/{name}" for key, name in names.items()})
    found = placed(config, Path("~/out"))
    assert found.run_dir == str(tmp_path / "out")
    assert {key: found.flat()[key] for key in names} == {
        key: str(tmp_path / name) for key, name in names.items()
    }
    with pytest.raises(InputError, match="'~no-such-user/x' begins with the home directory"):
        placed(tiny_config(**{"data.source": "~no-such-user/x"}), tmp_path / "out")


def test_a_gpu_that_is_not_there_is_refused_by_the_engine_inline(tiny_config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(run, "prepare", lambda _: pytest.fail("records were read"))
    config = tiny_config(**{"engine.gpus": 0.5})
    with (
        pytest.raises(InputError, match=r"engine.gpus is 0.5, but torch finds no GPU here"),
        run.load("inline", config),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_without_a_cluster_is_refused_at_once(tiny_config, address, monkeypatch):
    with socket.socket() as held:  # nothing listens at it
        held.bind(("127.0.0.1", 0))
        address = address.format(port=held.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(
                InputError, match=f"RAY_ADDRESS is {address}, where no Ray cluster answers"
            ),
            run.load("ray", tiny_config()),
        ):
            pass


@pytest.mark.parametrize("kind", ["inline", "ray"])
def test_more_threads_than_processors_are_refused_before_anything_is_read(
    tiny_config, monkeypatch, kind
):
    monkeypatch.setattr(run, "prepare", lambda _: pytest.fail("read"))
    config = tiny_config(**{"engine.threads": processors.count() + 1})
    with (
        pytest.raises(InputError, match=r"engine\.threads is \d+; it must be at most \d+"),
        run.load(kind, config),
    ):
        pass

"""Copies of a run's figures: refused without the package, no danger to a run, the same numbers."""

import logging
from pathlib import Path

import pytest

from fedlora.errors import InputError
from fedlora.run_files import read_records
from server import tracking


@pytest.mark.parametrize("name", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(
    name, tiny_config, simulate_run, monkeypatch
):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda module: None)
    config = tiny_config(**{f"tracking.{name}": "somewhere"})
    with pytest.raises(InputError, match=f"tracking.{name} is 'somewhere'.*pip install"):
        simulate_run(config)
    assert not Path(config.run_dir, "config.toml").exists()


def test_a_tracker_that_fails_midway_is_left_alone(tiny_config, caplog):
    class Board:
        def add_scalar(self, *_):
            raise OSError("disk full")

    tracked = tracking.Tracking(tiny_config(), "run")
    tracked._board = Board()
    record = {"round": 1, "seconds": 1.0, "updates": 4, "aggregation_error": None}
    record |= {"epsilon_max": "inf", "institutions": {}, "metrics": {"accuracy": 0.5}}
    with caplog.at_level(logging.WARNING, "fedlora.server"):
        tracked.round(record)
        tracked.round(record)
        tracked.end()
    assert [r.message for r in caplog.records] == ["tracking stops after round 1: disk full"]
    assert tracking.figures(record) == {"seconds": 1.0, "updates": 4, "bytes": 0, "accuracy": 0.5}


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hunter2@host:5000",
        "https://hunter2@host",
        "postgresql+psycopg2://user:hun/ter2@host/db",
        "mysql://user:hunter2%40host/db",
        "postgresql://host/db?user=u&password=hunter2",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Du%3BPWD%3Dhunter2",
        "https://host/path?access_token=hunter2",
    ],
)
def test_a_tracking_uri_with_a_password_is_refused_and_never_quoted(uri, tiny_config):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as error:
        tiny_config(**{"tracking.mlflow": uri})
    assert "hun" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    ["", "sqlite:///mlflow.db", "http://host:5000", "postgresql://user@host:5432/db", "databricks"],
)
def test_a_tracking_uri_without_one_is_taken(uri, tiny_config):
    assert tiny_config(**{"tracking.mlflow": uri}).tracking.mlflow == uri


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_institutions_of_a_simulation_do_not_get_the_tracking_section(
    engine, tiny_config, monkeypatch
):
    from simulation import run
    from simulation.engines import inline, ray

    given = []
    taken = {"inline": (inline, "InlineGrid", 2), "ray": (ray, "RayGrid", 2)}
    module, name, place = taken[engine]

    class Taken(Exception):
        pass

    def take(*arguments, **_):
        given.append(arguments[place])
        raise Taken

    monkeypatch.setattr(module, name, take)
    config = tiny_config(**{"tracking.mlflow": "http://inside:5000"})
    records = run.prepare(config)
    with (
        pytest.raises(Taken),
        run.open_engine(engine, config, run.Loaded(records=records, forks=None)),
    ):
        pass
    assert not any(key.startswith("tracking.") for key in given[0])
    assert given == [config.shared()]


@pytest.mark.slow
def test_both_trackers_hold_what_rounds_jsonl_holds(tiny_config, simulate_run, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs fedlora[tracking]")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs fedlora[tracking]"
    )
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = tiny_config(**{"tracking.mlflow": uri, "tracking.tensorboard": str(tmp_path / "tb")})
    simulate_run(config)
    truth = [r["metrics"]["accuracy"] for r in read_records(Path(config.run_dir))]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["adapter.rank"] == "8"
    logged = client.get_metric_history(run.info.run_id, "accuracy")
    assert [m.value for m in logged] == truth
    board = events.EventAccumulator(str(next((tmp_path / "tb").iterdir())))
    board.Reload()
    assert [s.value for s in board.Scalars("accuracy")] == pytest.approx(truth)

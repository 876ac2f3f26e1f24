"""Copies of a run's figures: refused without the package, no danger to a run, the same numbers."""

import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from fedlora.errors import InputError
from fedlora.models.adapters import AdapterState
from fedlora.runs.run_files import read_records
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

    class Client:
        def __init__(self):
            self.logged = []

        def log_metric(self, run, name, value, *, step):
            if step == 2:
                raise OSError("no route")
            self.logged.append(name)

    tracked = tracking.Tracking(tiny_config(), "run")
    tracked._board, tracked._client = Board(), (client := Client())
    record = {"round": 1, "seconds": 1.0, "updates": 4}
    record |= {"epsilon_max": "inf", "institutions": {}, "metrics": {"accuracy": 0.5}}
    with caplog.at_level(logging.WARNING, "fedlora.server"):
        tracked.round(record)
        assert set(client.logged) == set(tracking.figures(record))  # the other one goes on
        tracked.round(record | {"round": 2})
        tracked.round(record | {"round": 3})
        tracked.end()
    assert [r.message for r in caplog.records] == [
        "TensorBoard gets nothing from round 1 on: disk full",
        "MLflow gets nothing from round 2 on: no route",
    ]
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
    with pytest.raises(Taken), run.open_engine(engine, config):
        pass
    assert not any(key.startswith("tracking.") for key in given[0])
    assert given == [config.shared()]


class Store:
    """A stand-in for ``mlflow.MlflowClient``: runs by id, with all that was logged."""

    runs: ClassVar[dict[str, dict]] = {}
    models: ClassVar[dict[str, list]] = {}

    def __init__(self, tracking_uri):
        pass

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=name)

    def search_runs(self, experiments, query):
        wanted = query.split("'")[1]
        found = [i for i, r in self.runs.items() if r["tags"]["fedlora_run"] == wanted]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=i)) for i in found]

    def create_run(self, experiment, tags, run_name):
        key = f"run-{len(self.runs)}"
        self.runs[key] = {"tags": tags, "name": run_name, "params": {}, "files": {}}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

    def log_param(self, run, key, value):
        self.runs[run]["params"][key] = value

    def log_metric(self, run, key, value, step):
        self.runs[run].setdefault(key, []).append(value)

    def log_artifact(self, run, path):
        self.runs[run]["files"][Path(path).name] = Path(path).read_bytes()

    def log_artifacts(self, run, directory, place):
        for file in Path(directory).iterdir():
            self.runs[run]["files"][f"{place}/{file.name}"] = file.read_bytes()

    def search_registered_models(self, query):
        return [name for name in self.models if f"name = '{name}'" == query]

    def create_registered_model(self, name):
        assert name not in self.models
        self.models[name] = []

    def get_run(self, run):
        return types.SimpleNamespace(info=types.SimpleNamespace(artifact_uri=f"store:/{run}"))

    def create_model_version(self, name, source, run_id):
        self.models[name].append((source, run_id))

    def set_terminated(self, run):
        self.runs[run]["ended"] = True


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(Store, "runs", {})
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Store))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda n: n if n == "mlflow" else find(n)
    )
    return Store.runs


def test_mlflow_gets_a_run_s_name_adapter_promise_and_report(
    store, tiny_config, simulate_run, tmp_path
):
    config = tiny_config(**{"tracking.mlflow": "sqlite:///x.db", "federation.rounds": 1})
    result = simulate_run(config)
    (run,) = store.values()
    directory = Path(config.run_dir)
    assert run["name"] == directory.name and run["ended"] and len(run["accuracy"]) == 1
    assert run["files"]["privacy.json"] == (directory / "privacy.json").read_bytes()
    adapter = {f"adapter/{p.name}": p.read_bytes() for p in (directory / "adapter").iterdir()}
    assert {"adapter/adapter_model.safetensors", "adapter/README.md"} <= adapter.keys()
    assert run["files"].items() >= adapter.items()
    page = tmp_path / "report.html"
    tracking.add_report(config, result["run"], page)  # there is none yet
    page.write_text("<html>")
    tracking.add_report(config, result["run"], page)
    assert run["files"]["report.html"] == b"<html>" and len(store) == 1


def test_mlflow_registers_an_adapter_on_request(store, tiny_config, simulate_run, monkeypatch):
    monkeypatch.setattr(Store, "models", {})
    values = {"tracking.mlflow": "sqlite:///x.db", "federation.rounds": 1}
    config = tiny_config(**values, **{"tracking.mlflow-model": "complaints"})
    for number in (1, 2):
        simulate_run(config.replace({"run-dir": f"{config.run_dir}-{number}"}))
    assert Store.models == {"complaints": [(f"store:/{run}/adapter", run) for run in store]}
    with pytest.raises(InputError, match="mlflow-model is 'x', but tracking"):
        tiny_config(**{"tracking.mlflow-model": "x"})


def test_the_cells_of_a_sweep_are_nested_in_its_run(store, tiny_config, monkeypatch, tmp_path):
    config = tiny_config(**{"tracking.mlflow": "sqlite:///x.db"})
    parent = tracking.begin_sweep(config, tmp_path / "grid")
    assert tracking.begin_sweep(config, tmp_path / "grid") == parent  # a resumed sweep
    monkeypatch.setenv(tracking.SWEEP, parent)
    tracking.Tracking(config, "cell")
    monkeypatch.delenv(tracking.SWEEP)
    tracking.Tracking(config, "alone")
    table = tmp_path / "results.csv"
    table.write_text("accuracy")
    tracking.end_sweep(config, parent, table)
    sweep, cell, alone = store.values()
    assert sweep["name"] == "grid" and sweep["ended"] and "results.csv" in sweep["files"]
    assert cell["tags"]["mlflow.parentRunId"] == parent and cell["params"]["adapter.rank"] == 8
    assert "mlflow.parentRunId" not in alone["tags"]
    assert tracking.begin_sweep(tiny_config(), tmp_path / "grid") == ""


def test_a_report_that_cannot_be_logged_is_a_warning(store, tiny_config, tmp_path, caplog):
    Store.runs["gone"] = {}  # without tags: a search fails
    (tmp_path / "report.html").write_text("x")
    config = tiny_config(**{"tracking.mlflow": "sqlite:///x.db"})
    with caplog.at_level(logging.WARNING, "fedlora.server"):
        tracking.add_report(config, "run", tmp_path / "report.html")
    assert "report.html was not logged" in caplog.text


@pytest.mark.slow
def test_both_trackers_hold_what_rounds_jsonl_holds(
    tiny_config, simulate_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # MLflow keeps the files of a local store in ./mlruns
    mlflow = pytest.importorskip("mlflow", reason="needs the extra tracking")
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tracking"
    )
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = tiny_config(
        **{
            "tracking.mlflow": uri,
            "tracking.mlflow-model": "complaints",
            "tracking.tensorboard": str(tmp_path / "tb"),
        }
    )
    simulate_run(config)
    truth = [r["metrics"]["accuracy"] for r in read_records(Path(config.run_dir))]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["adapter.rank"] == "8"
    logged = client.get_metric_history(run.info.run_id, "accuracy")
    assert [m.value for m in logged] == truth
    adapter = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="adapter", tracking_uri=uri, dst_path=str(tmp_path)
    )
    assert AdapterState.open(Path(adapter)).keys()
    (version,) = client.search_model_versions("name = 'complaints'")
    assert version.run_id == run.info.run_id
    registered = client.get_model_version_download_uri("complaints", version.version)
    (tmp_path / "registered").mkdir()
    fetched = mlflow.artifacts.download_artifacts(
        artifact_uri=registered, tracking_uri=uri, dst_path=str(tmp_path / "registered")
    )
    assert AdapterState.open(Path(fetched)).keys()
    (place,) = (tmp_path / "tb").iterdir()
    assert place.name.startswith(f"{Path(config.run_dir).name}-")
    board = events.EventAccumulator(str(place))
    board.Reload()
    assert [s.value for s in board.Scalars("accuracy")] == pytest.approx(truth)

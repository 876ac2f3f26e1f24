"""Packages that only some uses need: one clear error before the use begins."""

import sys
from importlib import metadata

import pytest

from fedlora import extras
from fedlora.data import rows, sources
from fedlora.errors import InputError
from fedlora.gradients import verdicts
from fedlora.models import models


def test_an_installed_package_is_accepted_and_a_missing_one_named_with_its_remedy(missing):
    extras.require("json", "demo", "a test")
    missing("ray")
    with pytest.raises(InputError) as caught:
        extras.require("ray", "simulation", "--engine ray")
    text = str(caught.value)
    assert text.startswith("--engine ray needs the Python package ray, which is not installed")
    assert "pip install --constraint constraints.txt -e '.[simulation]'" in text
    assert "add simulation to the build argument EXTRAS" in text and "\n" not in text


def test_every_extra_that_an_error_names_exists_and_installs_the_package():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    found = project["project"]["optional-dependencies"]
    for package, extra in (
        ("datasets", "simulation"),
        ("flwr-datasets", "simulation"),
        ("flwr[simulation]", "simulation"),  # Ray
        ("bitsandbytes", "qlora"),
    ):
        assert any(line.startswith(package) for line in found[extra]), (package, extra)


def test_a_hub_source_without_datasets_is_refused(missing, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    missing("datasets")
    with pytest.raises(InputError, match=r"'hub:org/name' needs .* datasets.*\[simulation\]"):
        sources.frame("hub:org/name")


def test_a_partition_by_a_scheme_without_flwr_datasets_is_refused_before_rows_are_read(
    missing, monkeypatch, tiny_config
):
    from fedlora.data import records

    monkeypatch.setattr(rows, "read_table", lambda *_: pytest.fail("rows were read"))
    missing("flwr_datasets")
    with pytest.raises(InputError, match=r"data\.partition iid needs .* flwr_datasets"):
        records.load(tiny_config(**{"data.partition": "iid", "data.institutions": 3}))


def test_a_deployed_institution_reads_its_records_without_the_extra_simulation(
    missing, monkeypatch, tiny_config
):
    from fedlora.data import records

    missing("flwr_datasets", "datasets")
    for module in ("flwr_datasets", "flwr_datasets.partitioner", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    # what client.config_policy makes of any run
    found = records.load(
        tiny_config(**{"data.partition": "iid", "data.institutions": 1, "data.test-fraction": 0.0})
    )
    assert len(found.names) == 1 and len(found.all_train) == found.counts["rows"] > 0


def test_a_model_is_examined_without_the_package_for_quantised_bases(monkeypatch):
    verdicts.environment.cache_clear()
    monkeypatch.setattr(metadata.Distribution, "from_name", _not_installed)
    try:
        assert set(verdicts.environment()) >= {"bitsandbytes", "code", "processor"}
        assert verdicts.environment()["bitsandbytes"] == "not installed"
    finally:
        verdicts.environment.cache_clear()


def _not_installed(name):
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_without_bitsandbytes_is_refused_before_it_is_loaded(
    missing, monkeypatch, tiny_config, quantization
):
    monkeypatch.setattr(models, "load_tokenizer", lambda _: pytest.fail("loading began"))
    missing("bitsandbytes")
    with pytest.raises(InputError, match=rf"{quantization} needs .* bitsandbytes.*\[qlora\]"):
        models.load_base(
            tiny_config().model.name,
            dtype="auto",
            quantization=quantization,
            task="classification",
            num_labels=3,
        )

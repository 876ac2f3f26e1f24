"""Packages that only some uses need: one clear error before the use begins."""

from importlib import metadata

import pytest

from fedlora import extras
from fedlora.data import rows
from fedlora.errors import InputError
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


def test_a_partition_by_a_scheme_without_flwr_datasets_is_refused_before_rows_are_read(
    missing, monkeypatch, tiny_config
):
    from fedlora.data import records

    monkeypatch.setattr(rows, "read_table", lambda *_: pytest.fail("rows were read"))
    missing("flwr_datasets")
    with pytest.raises(InputError, match=r"data\.partition iid needs .* flwr_datasets"):
        records.load(tiny_config(**{"data.partition": "iid", "data.institutions": 3}))


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

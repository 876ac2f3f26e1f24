"""The documentation names each setting, code and key, and its commands fit the tree."""

import dataclasses
import re

import pytest

from client import config_policy
from client.settings import Settings
from deployment import setup
from fedlora.config import config
from tests.deployment.harness import ROOT

TEXT = (ROOT / "docs" / "deployment.md").read_text()
PROTOCOL = (ROOT / "docs" / "secure-aggregation.md").read_text()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_each_setting_has_a_row(field):
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert any(f"`{field.replace('_', '-')}`" in row.split("|")[1] for row in rows)


def test_each_refusal_is_named():
    rooms = ("client", "deployment", "fedlora", "server", "strategies")
    files = [file for room in rooms for file in (ROOT / room).glob("*.py")]
    text = "".join(file.read_text() for file in files)
    codes = set(re.findall(r'(?:Refusal|pack_refusal)\(\s*"([a-z-]+)"', text))
    rules = [rule for rule in config_policy.KEYS.values() if isinstance(rule, config_policy.Taken)]
    codes |= {limit.code for rule in rules for limit in rule.limits} | {"other-data"}
    sent = {"guard" if code.startswith("guard-") else code for code in codes}
    assert len(sent) > 90
    assert {code for code in sent if f"`{code}`" not in TEXT + PROTOCOL} == set()


def test_each_key_of_a_configuration_is_named_under_its_rule():
    rows = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ")]
    named = {
        (key, row[1].strip())
        for row in rows
        if row[1].strip() in ("taken", "own", "unused")
        for key in re.findall(r"`([a-z.-]+)`", row[2])
        if key in config_policy.KEYS
    }
    assert named == {(k, type(rule).__name__.lower()) for k, rule in config_policy.KEYS.items()}


def test_the_keys_of_secure_aggregation_go_with_the_example_run(tmp_path):
    step = TEXT.partition("5. **The run.**")[2].partition("\n\n")[0]
    given = dict(re.findall(r'`([a-z.-]+)\s=\s+"?([^`"]+)"?`', step))
    assert "`privacy.honest`" in step and "`privacy.colluding`" in step
    (tmp_path / "run.toml").write_bytes(setup._example_run(3))
    run = config.load(tmp_path / "run.toml", {**given, "privacy.honest": 2, "privacy.colluding": 1})
    assert run.deployed and run.privacy.masks and len(given) == 6


@pytest.mark.parametrize("file", ["README.md", "docs/deployment.md", "docker-compose.yml"])
def test_the_directory_of_keys_in_a_documented_command_is_free_and_never_committed(file):
    named = set(re.findall(r"fedlora deploy init (\S+)", (ROOT / file).read_text()))
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert named
    for directory in named:
        assert not (ROOT / directory / "__init__.py").exists()
        assert f"/{directory}/" in ignored


def test_each_argument_of_the_image_is_documented_and_declared_before_the_installation():
    before, installation, _ = (ROOT / "Dockerfile").read_text().partition("RUN pip install")
    declared = set(re.findall(r"^ARG ([A-Z_]+)", before, re.MULTILINE))
    assert installation and declared == set(re.findall(r"--build-arg\s+([A-Z_]+)=", TEXT))

"""docs/deployment.md names each setting of an institution and each code that it refuses with."""

import dataclasses
import re

import pytest

from client.settings import Settings
from tests.deployment.harness import ROOT

TEXT = (ROOT / "docs" / "deployment.md").read_text()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_each_setting_has_a_row(field):
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert any(f"`{field.replace('_', '-')}`" in row.split("|")[1] for row in rows)


def test_each_refusal_is_named():
    files = [f for room in ("client", "deployment") for f in (ROOT / room).glob("*.py")]
    text = "".join(file.read_text() for file in files)
    codes = set(re.findall(r'(?:Refusal|pack_refusal)\(\s*"([a-z-]+)"', text))
    table = (ROOT / "client" / "settings.py").read_text().partition("limits = (")[2]
    codes |= set(re.findall(r'\(\s*"([a-z-]+)",', table))
    sent = {"guard" if code.startswith("guard-") else code for code in codes}
    assert len(sent) > 15
    assert {code for code in sent if f"`{code}`" not in TEXT} == set()

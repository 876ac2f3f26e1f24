"""How processes start."""

import gc
import subprocess
import sys

import pytest
import torch

from fedlora import startup


def test_what_is_compiled_while_importing_is_compiled_at_its_first_call(monkeypatch):
    asked = []

    def compiler(function, **options):
        asked.append(options)
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compiler)
    with startup.importing():

        @torch.compile(dynamic=False)
        def double(x):
            return 2 * x

        @torch.compile
        def triple(x):
            return 3 * x

        assert not gc.isenabled()
    assert not asked and torch.compile is compiler and gc.isenabled()
    assert [double(3), double(4), triple(3)] == [7, 9, 10]
    assert asked == [{"dynamic": False}, {}]  # once each
    assert double.__name__ == "double"


def test_what_is_no_function_is_compiled_at_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: (model, "compiled"))
    module = torch.nn.Identity()
    with startup.importing():
        assert torch.compile(model=module) == (module, "compiled")


def test_importing_what_institutions_run_does_without_torchs_compiler():
    code = (
        "import sys\nfrom fedlora.startup import importing\nwith importing():\n"
        "    import client.app\nprint('torch._inductor.compile_fx' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == "False"


@pytest.mark.parametrize(("mib", "kept"), [(100, True), (300, False)])
def test_memory_that_was_freed_is_given_back_after_growing_by_much(mib, kept):
    code = f"""
import psutil
from fedlora import startup
rss = lambda: psutil.Process().memory_info().rss / 2**20
startup._LIBC.mallopt(-3, 2**30)  # no mappings of their own
blocks = [b'x' * 2**20 for _ in range({mib})]
pins = [b'x' * 600 for _ in range(1000)]  # above them
startup._held = rss() * 2**20 - ({mib} << 20)
del blocks
before = rss()
startup.let_go()
print(before - rss())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (float(said.stdout) < 10) == kept

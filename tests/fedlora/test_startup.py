"""How processes start."""

import gc
import subprocess
import sys

import pytest

from fedlora import startup


def test_garbage_collection_pauses_in_a_block_and_goes_on_after_it():
    assert gc.isenabled()
    with pytest.raises(KeyError), startup.paused_gc():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with startup.paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_importing_what_institutions_run_does_without_torchs_compiler(modules_of_a_node):
    assert {"client.app", "torch"} <= modules_of_a_node
    assert "torch._inductor.compile_fx" not in modules_of_a_node


@pytest.mark.parametrize(("mib", "kept"), [(100, True), (300, False)])
def test_freed_memory_returns_to_the_system_once_the_process_has_grown_by_the_threshold(mib, kept):
    code = f"""
import psutil
from fedlora import startup
rss = lambda: psutil.Process().memory_info().rss / 2**20
startup._LIBC.mallopt(-3, 2**30)  # no mappings of their own
blocks = [b'x' * 2**20 for _ in range({mib})]
pins = [b'x' * 600 for _ in range(1000)]  # above them
startup._bytes_after_trim = rss() * 2**20 - ({mib} << 20)
del blocks
before = rss()
startup.trim_heap()
print(before - rss())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (float(said.stdout) < 10) == kept

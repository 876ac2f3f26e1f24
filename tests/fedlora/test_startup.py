"""How processes start."""

import gc

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

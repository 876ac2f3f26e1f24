"""``flwr run .``: the same apps through Flower's own runtime give the same adapter."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch

from fedlora.models.adapters import AdapterState

ROOT = Path(__file__).parents[2]
MINUTES = 6


@pytest.fixture
def flower(tmp_path):
    """Runs the flwr command with a home and a SuperLink of its own, which is stopped afterwards."""
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n'
        "options.num-supernodes = 4\noptions.backend.client-resources.num-cpus = 1\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(*arguments):
        return subprocess.run(
            ["flwr", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
        )

    yield run
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("FLWR_HOME") == str(home):
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [8.0, float("inf")])
def test_flowers_own_runtime_gives_the_very_adapter_of_our_engine(
    tiny_config, simulate_run, tmp_path, flower, epsilon
):
    if shutil.which("flwr", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("the flwr command is not beside this Python")
    ours = tiny_config(**{"privacy.epsilon": epsilon, "run-dir": str(tmp_path / "ours")})
    simulate_run(ours)
    theirs = ours.replace({"run-dir": str(tmp_path / "theirs")})
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(theirs.flat()))
    done = flower("run", ".", "local", "--run-config", str(file), "--stream")
    assert (tmp_path / "theirs" / "result.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    a, b = (AdapterState.open(Path(c.run_dir) / "adapter") for c in (ours, theirs))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    results = [json.loads((Path(c.run_dir) / "result.json").read_text()) for c in (ours, theirs)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["epsilon_max"] == results[1]["epsilon_max"]

"""A Ray cluster of three machines, each a network namespace with an address and a link of its own.

The head has no cores, as in docs/cluster/rayjob.yaml: the server shares its machine with no worker.
The machines share the disk, as pods share a volume.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD, *NODES = "head", "one", "two"
ADDRESS = {name: f"10.77.0.{number}" for number, name in enumerate((HEAD, *NODES), 2)}
CLUSTER = f"{ADDRESS[HEAD]}:6379"
LINK = "1gbit"
ROUNDS = 12
RANK = 32

BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))),
        reason="network namespaces need root, ip and tc (apt-get install iproute2)",
    ),
]


def quietly(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout} {done.stderr}"
    return done.stdout


def namespace(name: str) -> str:
    return f"fedlora-{name}"


def inside(name: str, *command: str) -> str:
    return quietly("ip", "netns", "exec", namespace(name), *command)


def end(name: str) -> None:
    """Kill every process of a machine, as when its power fails."""
    for pid in quietly("ip", "netns", "pids", namespace(name)).split():
        os.kill(int(pid), signal.SIGKILL)


def bytes_of(name: str) -> int:
    """Bytes that a machine has sent and received so far."""
    fields = inside(name, "cat", "/proc/net/dev").split("eth0:")[1].split()
    return int(fields[0]) + int(fields[8])


def start(name: str, temporary: Path) -> None:
    where = (
        ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        if name == HEAD
        else [f"--address={CLUSTER}", "--num-cpus=1"]
    )
    if name == HEAD:
        where.append(f"--temp-dir={temporary}")
    options = [f"--node-ip-address={ADDRESS[name]}", "--disable-usage-stats"]
    inside(name, str(BIN / "ray"), "start", *where, *options)


@pytest.fixture
def cluster():
    """Three machines with a Ray cluster. The name of its directory is short, for sockets."""
    made: list[str] = []
    temporary = Path("/tmp/fedlora-ray")
    try:
        quietly("ip", "link", "add", "fedlora0", "type", "bridge")
        quietly("ip", "link", "set", "fedlora0", "up")
        for name in (HEAD, *NODES):
            space = namespace(name)
            quietly("ip", "netns", "add", space)
            made.append(name)
            peer = ["type", "veth", "peer", "name", "eth0", "netns", space]
            quietly("ip", "link", "add", f"fl-{name}", *peer)
            quietly("ip", "link", "set", f"fl-{name}", "master", "fedlora0", "up")
            quietly("ip", "-n", space, "addr", "add", f"{ADDRESS[name]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                quietly("ip", "-n", space, "link", "set", device, "up")
            limit = ["rate", LINK, "burst", "256kb", "latency", "50ms"]
            inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
            start(name, temporary)
        yield temporary
    finally:
        for name in made:
            end(name)
        time.sleep(1.0)
        for name in made:
            quietly("ip", "netns", "del", namespace(name))
        subprocess.run(["ip", "link", "del", "fedlora0"], check=False)
        shutil.rmtree(temporary, ignore_errors=True)


def begin(config, folder: Path, *options: str) -> subprocess.Popen[str]:
    """A run on the head's machine, with its output in a file."""
    file = folder.with_suffix(".toml")
    file.write_text(config.replace({"run-dir": ""}).to_toml())
    command = [str(BIN / "fedlora"), "run", str(file), "--out", str(folder), *options]
    with folder.with_suffix(".txt").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace(HEAD), *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": CLUSTER},  # which the engine inline does not read
        )


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_three_machines_give_the_result_of_one_even_if_one_of_them_is_lost(
    cluster, tiny_config, tmp_path
):
    config = tiny_config(**{"federation.rounds": ROUNDS, "adapter.rank": RANK})
    joined = ("--engine", "ray")
    runs = {name: tmp_path / name for name in ("one", "three", "lost")}

    assert begin(config, runs["one"], "--engine", "inline").wait(300) == 0

    before = {name: bytes_of(name) for name in NODES}
    assert begin(config, runs["three"], *joined).wait(300) == 0, (
        runs["three"].with_suffix(".txt").read_text()
    )
    moved = {name: bytes_of(name) - before[name] for name in NODES}
    assert all(moved.values()), "each machine has worked"
    assert adapter(runs["three"]) == adapter(runs["one"])

    process = begin(config, runs["lost"], *joined)
    log = runs["lost"].with_suffix(".txt")
    until = time.monotonic() + 200
    while not re.search(r"round [2-9]/", log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    end("two")
    assert process.poll() is None, "the machine is lost while the run goes on"
    assert process.wait(300) == 0, log.read_text()
    assert adapter(runs["lost"]) == adapter(runs["one"])
    print(f"bytes of {ROUNDS} rounds at each node: {moved}")

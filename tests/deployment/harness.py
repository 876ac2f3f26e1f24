"""Runs docker-compose.yml without Docker: its services as processes in namespaces.

Read from the compose file and the Dockerfile, and done: commands, environments, volumes with their
``:ro``, users, read-only roots, tmpfs with their sizes, capabilities and no-new-privileges, init,
networks, names, dependencies, health checks, restart policies. A federation lives in one process
with namespaces of its own (network, mounts, processes); whatever happens to the test, its end is
the end of everything in it, and the host sees nothing of it but the logs.

Needs root, or else user namespaces that anybody may make; `unavailable` says what is missing.

What differs from the containers:

- The image is this checkout (what the Dockerfile copies), this Python's environment, and the
  host's /usr and a little of /etc, mounted read-only; the Dockerfile's RUN is not run. Packages
  that it would not install cannot be imported.
- No memory, process or CPU limits, and no log rotation: those need cgroups and an engine.
- Without root, services run as the caller, whatever ``user`` says.
- A published port is reached on the gateway's address in the network ``published``, by an
  `outsider`, not on the host's.
- Addresses stay the same over restarts; names are in /etc/hosts too, not at the resolver alone.
- Health checks run every second while somebody waits for them, not at their interval.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
PATIENCE = 300.0  # seconds for what is slow on a busy machine

RESOLVER = "127.0.0.54"  # in every service; not Docker's, on which nothing may rely
ETC = ("passwd", "group", "nsswitch.conf", "ssl", "nginx", "ld.so.cache", "alternatives")

# What `init: true` is: hands on signals, reaps orphans, ends with its child's code.
INIT = """
"$@" & child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"; code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
exit "$code"
"""


def unavailable() -> str:
    """Why this machine cannot run the harness; empty when it can."""
    for tool in ("nginx", "ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed (apt-get install nginx-light iproute2 util-linux)"
    probe = [*_unshare(), "ip", "link", "add", "name", "bridge0", "type", "bridge"]
    tried = subprocess.run(probe, text=True, capture_output=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _enter(process: int) -> list[str]:
    """A command's beginning that runs it in the namespaces of a process."""
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", f"--target={process}", *user, "--net", "--mount", "--pid"]


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and only waits to be reaped does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def compose(environment: Mapping[str, str], file: Path = COMPOSE) -> dict[str, Any]:
    """The compose file with its variables filled in, as Compose does it.

    Raises:
        KeyError: For a variable that is required and not there; the message is the file's.
    """

    def value(match: re.Match[str]) -> str:
        name, how, other = match["name"], match["how"], match["other"]
        if found := environment.get(name, ""):
            return found
        if how == ":-":
            return other
        raise KeyError(f"{name}: {other or 'is not set'}")

    def fill(node: Any) -> Any:
        if isinstance(node, str):
            return re.sub(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<other>[^}]*))?\}", value, node)
        if isinstance(node, dict):
            return {key: fill(item) for key, item in node.items()}
        return [fill(item) for item in node] if isinstance(node, list) else node

    return fill(yaml.safe_load(file.read_text()))


def environment_file(path: Path) -> dict[str, str]:
    """The variables of an .env file."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value.strip("'\"") for name, _, value in pairs}


def image() -> tuple[list[str], dict[str, str]]:
    """What the Dockerfile copies into /app, and the environment that it sets."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [
        name
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
        for name in line.split()[:-1]
    ]
    (variables,) = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    return copied, dict(pair.split("=", 1) for pair in variables.split())


@functools.cache
def absent() -> tuple[list[str], list[str]]:
    """Top-level modules and packages of this Python's environment that the image does not install.

    The image has fedlora with the extras of the Dockerfile, and what these depend on.
    """
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    found: set[tuple[str, str]] = set()
    open_ = [("fedlora", extra) for extra in ("", *extras.split(","))]
    while open_:
        name, extra = open_.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        with contextlib.suppress(metadata.PackageNotFoundError):
            for requirement in map(Requirement, metadata.requires(name) or ()):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    needed = canonicalize_name(requirement.name)
                    open_ += [(needed, e) for e in ("", *requirement.extras)]
    installed = {name for name, _ in found} | {"pip", "setuptools"}
    modules = [
        module
        for module, packages in metadata.packages_distributions().items()
        if installed.isdisjoint(map(canonicalize_name, packages))
    ]
    every = {canonicalize_name(one.name) for one in metadata.distributions()}
    return sorted(modules), sorted(every - installed)


SITE = """
import re, sys
from importlib import metadata

sys.modules.update(dict.fromkeys({modules}))
find = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if re.sub("[-_.]+", "-", name).lower() in {packages}:
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""
"""A sitecustomize that hides what is `absent`."""


@dataclass
class Service:
    """A service of the file and its process."""

    name: str
    spec: dict[str, Any]
    addresses: dict[str, str]  # network -> address
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = False
    restarts: int = 0
    links: list[str] = field(default_factory=list)  # the fabric's ends of its interfaces


class Federation:
    """The services of docker-compose.yml, started and stopped as `docker compose` does.

    Args:
        env: The .env file of ``fedlora deploy init``.
        scratch: A directory for logs.
        image_files: Path in every container -> path here, of what the image holds besides.
        changes: Service -> what it has in place of the file's.
        volumes: Service -> what is mounted there besides.
        file: The compose file.
    """

    def __init__(
        self,
        env: Path,
        scratch: Path,
        *,
        image_files: Mapping[str, Path] | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        volumes: Mapping[str, Sequence[str]] | None = None,
        file: Path = COMPOSE,
    ) -> None:
        self._file = compose(environment_file(env), file)
        self._image_files = dict(image_files or {})
        self._logs = scratch / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._root = Path(tempfile.mkdtemp(dir=scratch, prefix="root-"))
        self._networks = {name: i for i, name in enumerate(self._file["networks"])}
        self._services: dict[str, Service] = {}
        self._links = self._added = 0
        self._lock = threading.RLock()
        for name, spec in self._file["services"].items():
            more = [*spec.get("volumes", ()), *(volumes or {}).get(name, ())]
            self.add(name, {**spec, "volumes": more, **(changes or {}).get(name, {})})
        ready = ["sh", "-c", "echo ready; exec sleep infinity"]
        self._fabric = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *_unshare(), *ready], stdout=subprocess.PIPE
        )
        assert self._fabric.stdout and self._fabric.stdout.readline() == b"ready\n"
        self._inner = psutil.Process(self._fabric.pid).children()[0].pid
        for network in self._networks:
            self._in_fabric("ip", "link", "add", "name", network, "type", "bridge")
            self._in_fabric("ip", "link", "set", network, "up")
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process; namespaces, bridges and mounts go with them."""
        self._closing.set()
        self._keeper.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._inner, signal.SIGKILL)
        self._fabric.wait()
        for service in self._services.values():
            if service.process:
                service.process.wait()

    # What there is.

    def add(self, name: str, spec: Mapping[str, Any]) -> None:
        """One more service, not started."""
        self._added += 1
        host = 9 + self._added
        self._services[name] = Service(
            name,
            dict(spec),
            {n: f"10.77.{self._networks[n]}.{host}" for n in spec.get("networks", [])},
        )

    @property
    def names(self) -> list[str]:
        return list(self._services)

    def running(self, name: str) -> bool:
        process = self._services[name].process
        return process is not None and process.poll() is None

    def restarts(self, name: str) -> int:
        """How often its restart policy started it again."""
        return self._services[name].restarts

    def addresses(self, name: str) -> list[str]:
        """Its addresses, one for each network."""
        return list(self._services[name].addresses.values())

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs in a service, its init first."""
        init = psutil.Process(self._init(self._services[name]))
        return [init, *init.children(recursive=True)]

    # What `docker compose` does.

    def up(self, *names: str) -> None:
        """Start services and what they depend on, and wait until they are healthy."""
        names = names or tuple(self._services)
        for name in names:
            if not self.running(name):
                if needed := self._services[name].spec.get("depends_on"):
                    self.up(*needed)
                self.start(name)
        for name in names:
            self.wait(name)

    def start(self, name: str) -> None:
        """Start a service without its dependencies."""
        with self._lock:
            service = self._services[name]
            service.wanted = True
            self._launch(service)

    def stop(self, name: str, *, grace: float = 10.0) -> int:
        """SIGTERM, then SIGKILL after the grace time, as `docker stop`. Gives its exit code."""
        with self._lock:
            service = self._services[name]
            service.wanted = False
            process, init = service.process, self._init(service)
        assert process
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGTERM)
        try:
            return process.wait(grace)
        except subprocess.TimeoutExpired:
            os.kill(init, signal.SIGKILL)
            return process.wait()

    def kill(self, name: str) -> None:
        """SIGKILL to everything in a service, which stays down."""
        with self._lock:
            service = self._services[name]
            service.wanted = False
            os.kill(self._init(service), signal.SIGKILL)
            assert service.process
            service.process.wait()

    def crash(self, name: str) -> None:
        """SIGKILL to everything in a service; its restart policy decides what follows."""
        os.kill(self._init(self._services[name]), signal.SIGKILL)

    def restart(self, name: str) -> None:
        """Stop, start, and wait until it is healthy."""
        self.stop(name)
        self.start(name)
        self.wait(name)

    def wait(self, name: str, seconds: float = PATIENCE) -> None:
        """Wait until a service's health check passes."""
        check = self._services[name].spec.get("healthcheck")
        deadline = time.monotonic() + seconds
        done: subprocess.CompletedProcess[str] | None = None
        while check and time.monotonic() < deadline:
            with contextlib.suppress(LookupError):  # it is between two starts
                kind, *command = check["test"]
                assert kind == "CMD"
                done = self.exec(name, *command, check=False)
                if done.returncode == 0:
                    return
            time.sleep(1.0)
        if check:
            said = f"{done.stdout}{done.stderr}" if done else "it does not run"
            log = "\n".join(self.log(name).splitlines()[-20:])
            raise TimeoutError(f"{name} is not healthy after {seconds:g} s: {said}\n{log}")

    def exec(
        self, name: str, *command: str, check: bool = True, timeout: float = PATIENCE, root=False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a service, as its user unless ``root``."""
        service = self._services[name]
        with self._lock:
            init = self._init(service)
        where = [f"--root=/proc/{init}/root", f"--wd=/proc/{init}/root/app"]
        user = [] if root else self._drop(service.spec)
        return subprocess.run(
            [*_enter(init), *where, *user, *command],
            env=self._environment(service.spec),
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    def outsider(self, *command: str, networks=("published",), volumes=(), **options: Any):
        """Run a command on a machine of its own, as `docker run --rm --network`."""
        name = f"outsider-{self._added}"
        like = next(iter(self._file["services"].values()))
        kept = ("user", "read_only", "tmpfs", "cap_drop", "security_opt", "init")
        spec = {key: like[key] for key in kept if key in like}
        self.add(name, {**spec, "networks": list(networks), "volumes": list(volumes),
                        "command": ["sleep", "infinity"]})  # fmt: skip
        self.start(name)
        try:
            return self.exec(name, *command, **options)
        finally:
            self.kill(name)
            with self._lock:
                del self._services[name]

    # The network.

    def cut(self, name: str) -> None:
        """Pull out a service's network cables."""
        for link in self._services[name].links:
            self._in_fabric("ip", "link", "set", link, "down")

    def restore(self, name: str) -> None:
        """Plug them in again."""
        for link in self._services[name].links:
            self._in_fabric("ip", "link", "set", link, "up")

    # What they say.

    def log(self, name: str) -> str:
        """All that a service wrote to stdout and stderr, over all its starts."""
        file = self._logs / name
        return file.read_text(errors="replace") if file.exists() else ""

    def records(self, name: str) -> list[dict[str, Any]]:
        """A service's log, which must be JSON lines."""
        return [json.loads(line) for line in self.log(name).splitlines()]

    # How.

    def _keep(self) -> None:
        """The restart policies: whoever ended by itself is started again."""
        while not self._closing.wait(0.5):
            with self._lock:
                for service in list(self._services.values()):
                    kept = service.spec.get("restart") in ("always", "unless-stopped")
                    if service.wanted and kept and service.process.poll() is not None:
                        service.restarts += 1
                        self._launch(service)

    def _in_fabric(self, *command: str) -> None:
        subprocess.run([*_enter(self._inner), *command], check=True)

    def _init(self, service: Service) -> int:
        """The process that is number 1 in a service.

        Raises:
            LookupError: When it does not run.
        """
        deadline = time.monotonic() + 10
        while service.process and service.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                for child in psutil.Process(service.process.pid).children(recursive=True):
                    (line,) = re.findall(
                        r"NSpid:(.*)", Path(f"/proc/{child.pid}/status").read_text()
                    )
                    first = len(line.split()) == self._depth + 2 and line.split()[-1] == "1"
                    if first and "init" in child.cmdline():  # it has its file tree by then
                        return child.pid
            time.sleep(0.02)
        raise LookupError(f"{service.name} does not run")

    @property
    def _depth(self) -> int:
        (line,) = re.findall(r"NSpid:(.*)", Path("/proc/self/status").read_text())
        return len(line.split())

    def _environment(self, spec: Mapping[str, Any]) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "PYTHONPATH": "/app",
            "OMP_NUM_THREADS": "1",
            **image()[1],
            **{key: str(value) for key, value in spec.get("environment", {}).items()},
        }

    def _drop(self, spec: Mapping[str, Any]) -> list[str]:
        """Become the service's user, without capabilities, as far as the file says so."""
        command = ["setpriv"]
        if os.geteuid() == 0 and (user := spec.get("user")):
            uid, _, gid = user.partition(":")
            command += [f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups"]
        if "ALL" in spec.get("cap_drop", ()):
            command += ["--bounding-set=-all", "--inh-caps=-all"]
        if "no-new-privileges:true" in spec.get("security_opt", ()):
            command += ["--no-new-privs"]
        return command

    def _launch(self, service: Service) -> None:
        script = "\n".join(["set -eu", *self._network(service), *self._mounts(service)])
        own = ["unshare", "--net", "--mount", "bash", "-c", script]
        with (self._logs / service.name).open("ab") as log:
            service.process = subprocess.Popen(
                [*_enter(self._inner), *own],
                env=self._environment(service.spec),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _network(self, service: Service) -> Iterator[str]:
        """Commands that plug a new network namespace into the bridges of its networks."""
        yield "ip link set lo up"
        service.links = []
        for i, (network, address) in enumerate(service.addresses.items()):
            link = f"link{self._links}"
            self._links += 1
            service.links.append(link)
            # of its address, as Docker makes it: neighbours need not learn it anew after a restart
            mac = ":".join(f"{int(part):02x}" for part in ("2", "66", *address.split(".")))
            yield f"ip link add name eth{i} address {mac} type veth peer name {link} netns 1"
            yield f"nsenter --target 1 --net ip link set {link} master {network} up"
            yield f"ip addr add {address}/24 dev eth{i}"
            yield f"ip link set eth{i} up"

    def _mounts(self, service: Service) -> Iterator[str]:
        """Commands that make the container's file tree and start its command there."""
        root, spec = self._root, service.spec

        def bind(source: Path | str, target: str, *, writable: bool = False) -> str:
            place = shlex.quote(f"{root}{target}")
            make = "mkdir -p" if Path(source).is_dir() else "install -D /dev/null"
            how = "rbind" if writable or str(source) == "/dev" else "bind,ro"
            mount = f"mount -o {how} {shlex.quote(str(source))} {place}"
            return f"[ -e {place} ] || {make} {place}\n{mount}"

        yield f"mount -t tmpfs -o mode=755 tmpfs {root}"
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):  # links into /usr
            if Path("/", name).is_symlink():
                yield f"ln -s usr/{name} {root}/{name}"
            elif Path("/", name).exists():
                yield bind(f"/{name}", f"/{name}")
        for path in ("/usr", "/dev", *(f"/etc/{name}" for name in ETC)):
            if Path(path).exists():
                yield bind(path, path)
        yield f"mount -t tmpfs -o mode=1777,size=64m tmpfs {root}/dev/shm"
        yield f"mkdir -p {root}/var/log/nginx {root}/var/lib/nginx {root}/run {root}/proc"
        for name in image()[0]:
            yield bind(ROOT / name, f"/app/{name}")
        for target, source in self._image_files.items():
            yield bind(source, target)
        site = self._root.with_name("sitecustomize.py")
        modules, packages = absent()
        site.write_text(SITE.format(modules=modules, packages=packages))
        yield bind(site, "/app/sitecustomize.py")
        hosts = self._root.with_name(f"{self._root.name}-{service.name}.hosts")
        hosts.write_text("\n".join(f"{ip} {name}" for ip, name in self._hosts(service)) + "\n")
        yield bind(hosts, "/etc/hosts")
        resolv = self._root.with_name("resolv.conf")
        resolv.write_text(f"nameserver {RESOLVER}\n")
        yield bind(resolv, "/etc/resolv.conf")
        names = str(ROOT / "tests/deployment/names.py")
        resolver = [sys.executable, "-ISs", names, str(hosts), RESOLVER]
        yield shlex.join(["setpriv", "--pdeathsig=KILL", *resolver]) + " &"
        for volume in spec.get("volumes", ()):
            source, target, *options = volume.split(":")
            yield bind(source, target, writable="ro" not in options)
        for entry in spec.get("tmpfs", ()):
            target, _, options = entry.partition(":")
            yield f"mkdir -p {root}{target}"
            yield f"mount -t tmpfs -o {options or 'mode=1777'} tmpfs {root}{target}"
        for path in dict.fromkeys((sys.base_prefix, sys.prefix)):  # may be under a tmpfs: last
            if not path.startswith("/usr/"):
                yield bind(path, path)
        start = [
            "set -eu",
            f"mount -t proc proc {root}/proc",
            *([f"mount -o remount,bind,ro {root}"] if spec.get("read_only") else []),
            f"exec chroot {root} "
            + shlex.join([*self._drop(spec), "bash", "-c", f"cd /app; {INIT}", "init"])
            + f" {shlex.join(self._command(spec))}",
        ]
        yield "exec unshare --pid --fork --kill-child bash -c " + shlex.quote("\n".join(start))

    def _command(self, spec: Mapping[str, Any]) -> Sequence[str]:
        command = spec["command"]
        return shlex.split(command) if isinstance(command, str) else command

    def _hosts(self, service: Service) -> Iterator[tuple[str, str]]:
        """Names that a service can resolve: its own, and those that share a network with it."""
        yield "127.0.0.1", "localhost"
        for other in self._services.values():
            shared = [a for n, a in other.addresses.items() if n in service.addresses]
            yield from ((address, other.name) for address in shared[:1])

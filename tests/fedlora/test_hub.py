"""Hub names through the real clients of the Hugging Face Hub; only HTTP is replaced."""

import csv
import hashlib
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory

from fedlora.data import sources
from fedlora.errors import InputError
from fedlora.models import model_files
from fedlora.models.adapters import AdapterState

COMMIT = "0123456789" * 4
TEXT_LABEL = {"text": "data.text", "label": "data.label"}
CONFIGS = """---
configs:
- config_name: full
  default: true
  data_files: [{split: train, path: full/train.parquet}, {split: test, path: full/test.parquet}]
- config_name: small
  data_files: [{split: train, path: small/train.parquet}]
---
"""


class Hub:
    """A Hub with the repositories below a folder, and an empty cache of this machine.

    ``folder/models/org/name`` and ``folder/datasets/org/name`` hold files. ``online`` is whether it
    can be reached, ``asked`` the paths that were downloaded.
    """

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, self._patch = folder, cache, monkeypatch
        self.online = True
        self.asked: list[str] = []
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(cache / "datasets"))
        self.set_offline(False)

    def set_offline(self, offline: bool) -> None:
        """As HF_HUB_OFFLINE does when the libraries are imported."""
        self._patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        self._patch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)

    def client(self) -> httpx.Client:
        hooks = default_client_factory().event_hooks
        return httpx.Client(transport=httpx.MockTransport(self._answer), event_hooks=hooks)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if not self.online:
            raise httpx.ConnectError("no route to host")
        parts = request.url.path.strip("/").split("/")
        listing = parts[0] == "api"
        kind, *rest = parts[1:] if listing else parts
        if kind not in ("models", "datasets"):
            kind, rest = "models", [kind, *rest]
        root = self.folder.joinpath(kind, *rest[:2])
        if len(rest) < 2 or not root.is_dir():
            return httpx.Response(404, headers={"X-Error-Code": "RepoNotFound"})
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        if listing and "tree" in rest:
            entries = [
                {"type": "file", "path": str(f.relative_to(root)), "size": f.stat().st_size,
                 "oid": digest(f)}
                for f in files
            ]  # fmt: skip
            return httpx.Response(200, json=entries)
        if listing:
            names = [{"rfilename": str(f.relative_to(root))} for f in files]
            about = {"id": "/".join(rest[:2]), "sha": COMMIT, "siblings": names, "private": False}
            return httpx.Response(200, json=about)
        file = root.joinpath(*rest[4:])  # org/name/resolve/REVISION/...
        if not file.is_file():
            return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"})
        if request.method == "GET":
            self.asked.append("/".join(rest[4:]))
        headers = {
            "ETag": digest(file),
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(file.stat().st_size),
        }
        content = file.read_bytes() if request.method == "GET" else b""
        return httpx.Response(200, headers=headers, content=content)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "served", tmp_path / "cache", monkeypatch)
    huggingface_hub.set_client_factory(made.client)
    yield made
    huggingface_hub.set_client_factory(default_client_factory)


def publish_model(hub, name, directory):
    target = hub.folder / "models" / name
    target.mkdir(parents=True)
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def cached_model(hub, name, directory):
    """What ``hf download`` leaves in the cache, written by hand."""
    root = hub.cache / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for file in directory.iterdir():
        blob = root / "blobs" / digest(file)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot


@pytest.fixture
def news(hub, complaints):
    """The complaints as a data set of the Hub: 480 rows and a test split, or 8 rows."""
    root = hub.folder / "datasets/owner/News"
    with complaints.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for path, some in (
        ("full/train", rows), ("full/test", rows[:4]), ("small/train", rows[:8])
    ):  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(pa.Table.from_pylist(some), root / f"{path}.parquet")
    (root / "README.md").write_text(CONFIGS)
    return [row["text"] for row in rows]


def test_a_model_in_the_hub_cache_trains_without_a_network_as_its_directory_does(
    hub, tiny_encoder, tiny_config, simulate_run, tmp_path
):
    snapshot = cached_model(hub, "org/tiny", tiny_encoder)
    hub.online = False
    for offline in (False, True):
        hub.set_offline(offline)
        assert model_files.resolve("org/tiny").path == snapshot
    made = []
    for i, name in enumerate(("org/tiny", str(tiny_encoder))):
        run = tmp_path / str(i)
        simulate_run(
            tiny_config(**{"model.name": name, "run-dir": str(run), "federation.rounds": 2})
        )
        made.append(AdapterState.open(run / "adapter"))
        assert f"`{Path(name).name if i else name}`" in (run / "adapter" / "README.md").read_text()
    assert all(torch.equal(made[0][tensor], made[1][tensor]) for tensor in made[1])


def test_a_hub_data_set_is_downloaded_once_and_then_read_without_a_network(hub, news):
    first = sources.read("hub:owner/News", TEXT_LABEL)
    assert first["text"] == news
    assert sources.read("hub:owner/News:small", TEXT_LABEL)["text"] == news[:8]
    assert sources.read("hub:owner/News", TEXT_LABEL, "test")["text"] == news[:4]
    hub.online = False
    hub.set_offline(True)
    assert sources.read("hub:owner/News:full", TEXT_LABEL) == first
    assert sources.read("hub:owner/News:small", TEXT_LABEL)["text"] == news[:8]


@pytest.mark.parametrize(
    ("source", "split", "offline", "message"),
    [
        ("hub:owner/absent", "train", False, "doesn't exist on the Hub"),
        ("hub:owner/absent", "train", True, "OfflineModeIsEnabled"),
        ("hub:owner/News:large", "train", False, "'large' not found. Available: "),
        ("hub:owner/News", "valid", False, 'Unknown split "valid"'),
    ],
)
def test_a_hub_data_set_that_is_not_there_is_an_error_of_one_line(
    hub, news, source, split, offline, message
):
    hub.set_offline(offline)
    with pytest.raises(InputError, match=message) as error:
        sources.read(source, TEXT_LABEL, split)
    said = str(error.value)
    assert said.startswith(f"data source {source!r} (split {split}) cannot be loaded")
    assert "\n" not in said and said.endswith("or give a local file")

"""Upload to a hub whose HTTP is replaced: what is sent, and what is refused before anything is."""

import base64
import json
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import default_client_factory

from fedlora.runs import hub_upload
from fedlora.errors import InputError
from fedlora.wire.released import FILE as RELEASE


class Receiver:
    """A hub that takes a repository and one commit."""

    def __init__(self) -> None:
        self.created: dict[str, object] = {}
        self.files: dict[str, bytes] = {}
        self.status = 200

    def client(self) -> httpx.Client:
        hooks = default_client_factory().event_hooks
        return httpx.Client(transport=httpx.MockTransport(self._answer), event_hooks=hooks)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if self.status != 200:
            return httpx.Response(self.status, json={"error": "no"}, request=request)
        if path == "/api/repos/create":
            self.created = json.loads(request.read())
            return httpx.Response(200, json={"url": "https://huggingface.co/org/adapter"})
        if path == "/api/validate-yaml":
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            named = [file["path"] for file in json.loads(request.read())["files"]]
            plain = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in named]
            return httpx.Response(200, json={"files": plain})
        if "/commit/" in path:
            for line in request.read().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            about = {
                "commitUrl": "https://huggingface.co/org/adapter/commit/1",
                "commitOid": "1" * 40,
            }
            return httpx.Response(200, json={**about, "success": True})
        about = {"id": "org/adapter", "sha": "0" * 40, "siblings": [], "private": True}
        return httpx.Response(200, json=about)


@pytest.fixture
def receiver(monkeypatch):
    made = Receiver()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.set_client_factory(made.client)
    yield made
    huggingface_hub.set_client_factory(default_client_factory)


@pytest.fixture
def run_dir(tmp_path, tiny_config):
    """A complete run's files; only those that an upload reads."""

    def write(**values):
        made = tiny_config(**values)
        folder = Path(made.run_dir)
        (folder / "adapter").mkdir(parents=True)
        (folder / "config.toml").write_text(made.to_toml())
        for name in ("result.json", "privacy.json"):
            (folder / name).write_text('{"protects": "each record"}')
        about = {"base_model_name_or_path": made.model.name, "r": 8}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(about))
        for name in ("adapter_model.safetensors", "README.md", "labels.json", RELEASE):
            (folder / "adapter" / name).write_text("{}")
        (folder / "institutions" / "Alpha" / "own").mkdir(parents=True)
        (folder / "institutions" / "Alpha" / "own" / "README.md").write_text("must not leave")
        return folder

    return write


def test_an_upload_is_private_and_holds_the_adapter_with_its_promise_and_no_path(receiver, run_dir):
    run = run_dir(**{"privacy.noise": "secure"})
    assert hub_upload.push(run, "org/adapter") == "https://huggingface.co/org/adapter"
    assert receiver.created["visibility"] == "private"
    assert set(receiver.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
        "privacy.json",
    }
    assert json.loads(receiver.files["privacy.json"]) == {"protects": "each record"}
    about = json.loads(receiver.files["adapter_config.json"])
    local = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert about == local | {"base_model_name_or_path": Path(local["base_model_name_or_path"]).name}
    assert "/" not in about["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"privacy.epsilon": float("inf")}, "epsilon was inf"),
        ({"privacy.noise": "seeded"}, "noise was seeded"),
    ],
)
def test_an_adapter_without_a_promise_is_uploaded_only_on_request(receiver, run_dir, values, why):
    run = run_dir(**values)
    with pytest.raises(InputError, match=f"{why}.*--unprotected"):
        hub_upload.push(run, "org/adapter")
    assert not receiver.created
    hub_upload.push(run, "org/adapter", unprotected=True, public=True)
    assert receiver.created["visibility"] == "public" and receiver.files


def test_a_refusal_of_the_hub_is_one_error_without_the_token(receiver, run_dir):
    run = run_dir(**{"privacy.noise": "secure"})
    receiver.status = 401
    with pytest.raises(InputError, match=r"the hub refused .org/adapter..*login") as error:
        hub_upload.push(run, "org/adapter")
    assert "hf_secret" not in str(error.value)
    with pytest.raises(InputError, match="the hub refused 'a/b/c'"):
        hub_upload.push(run, "a/b/c")


def test_an_unfinished_run_or_an_adapter_without_a_card_is_not_uploaded(receiver, run_dir):
    run = run_dir(**{"privacy.noise": "secure"})
    (run / "adapter" / "README.md").unlink()
    with pytest.raises(InputError, match=r"lacks README\.md"):
        hub_upload.push(run, "org/adapter")
    (run / "result.json").unlink()
    with pytest.raises(InputError, match="no complete run"):
        hub_upload.push(run, "org/adapter")
    shutil.rmtree(run)
    with pytest.raises(InputError, match="no complete run"):
        hub_upload.push(run, "org/adapter")
    assert not receiver.created

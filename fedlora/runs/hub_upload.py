"""Upload of a run's adapter directory to the Hugging Face Hub."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from fedlora.config.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.runs.model_card import CARD, base_name
from fedlora.wire.released import FILE as RELEASE
from fedlora.runs.run_files import (
    CONFIG,
    PRIVACY,
    UNKNOWN,
    read_run_file,
    refuse_audited,
    unprotected_origins,
    void,
)

log = logging.getLogger("fedlora")


def push(run_dir: Path, repo: str, *, public: bool = False, unprotected: bool = False) -> str:
    """Upload the released adapter of a complete run with its ``privacy.json``.

    The adapters that institutions trained at home, and their local parts, are never uploaded.

    Args:
        run_dir: The directory of a complete run.
        repo: ``OWNER/NAME`` on the hub.
        public: Whether a new repository is public.
        unprotected: Whether to upload although DP does not protect all that the adapter knows, or
            the result is void; the reasons are logged.

    Returns:
        The address of the upload.

    Raises:
        InputError: If the run is not complete, is an audited one or void, has no DP or goes back
            to a run without a promise, or the hub refuses the upload.
    """
    privacy = read_run_file(run_dir, PRIVACY)
    result = read_run_file(run_dir)
    config = load(run_dir / CONFIG)
    refuse_audited(run_dir, "push")
    _check_promise(config, result, unprotected)
    source = run_dir / "adapter"
    if missing := [n for n in (CONFIG_FILE, WEIGHTS_FILE, CARD) if not (source / n).is_file()]:
        raise InputError(
            f"{source} lacks {', '.join(missing)}; run again with this version of fedlora"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "adapter")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(RELEASE, ".*"))
        (folder / PRIVACY).write_text(json.dumps(privacy, indent=2) + "\n")
        _without_directories(folder / CONFIG_FILE, config)
        return _upload(folder, repo, public=public)


def _check_promise(config: RunConfig, result: Mapping[str, Any], unprotected: bool) -> None:
    """Refuse an adapter that may reveal training records, unless the user accepts that."""
    whys: list[str] = []
    if not config.privacy.enabled:
        whys.append("privacy.epsilon was inf")
    elif config.privacy.noise == "seeded":
        whys.append("privacy.noise was seeded, so that the noise can be subtracted")
    whys += [f"the result is void: {text}" for text in void(result)]
    whys += [
        f"what it started from ({of['source']}) is gone or was not written down"
        if of["run"] == UNKNOWN
        else f"it started from what the run {of['run']} trained on {of['source']} without a "
        "promise for these records"
        for of in unprotected_origins(result)
    ]
    if unprotected:
        for why in whys:
            log.warning("uploaded although %s", why)
    elif whys:
        raise InputError(
            f"not all that this adapter knows is protected ({'; '.join(whys)}), and it may reveal "
            "training records; give --unprotected if these records may be public"
        )


def _without_directories(file: Path, config: RunConfig) -> None:
    """Name the base model in an adapter's configuration without this machine's directories."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if content.get("base_model_name_or_path"):
        content["base_model_name_or_path"] = base_name(config)
        file.write_text(json.dumps(content, indent=2) + "\n")


def _upload(folder: Path, repo: str, *, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, commit_message="Adapter of a fedlora run"
        )
    except Exception as error:  # each transport has its own errors
        raise InputError(
            f"the hub refused {repo!r} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); check the name OWNER/NAME, the network and "
            "the login (hf auth login)"
        ) from None
    return str(address)

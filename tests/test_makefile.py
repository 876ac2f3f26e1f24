"""The Makefile's environment: when it is made anew, and what `make clean` leaves."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def interpreter(path, version):
    """A stand-in for a Python: it answers every command with its version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A directory with the Makefile and a complete environment of Python 3.11."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter(tmp_path / ".venv" / "bin" / "python", "3.11")
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


def commands(checkout, *arguments, environment=None):
    """What `make` would run for the environment."""
    paths = {"PATH": "/usr/bin:/bin:/usr/local/bin"} | (environment or {})
    command = ["make", "--dry-run", "-C", str(checkout), ".venv/.ready", *arguments]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=True)
    assert "not found" not in done.stderr
    return done.stdout


def test_a_complete_environment_is_kept(checkout):
    assert "-m" not in commands(checkout)
    same = interpreter(checkout / "same", "3.11")
    assert "-m" not in commands(checkout, f"PYTHON={same}")


def test_another_version_by_python_makes_the_environment_anew(checkout):
    other = interpreter(checkout / "other", "3.13")
    for given in (
        commands(checkout, f"PYTHON={other}"),
        commands(checkout, environment={"PYTHON": str(other)}),
    ):
        assert f"{other} -m venv --clear .venv" in given and "-m pip install" in given


@pytest.mark.parametrize("broken", ["dangling", "missing"])
def test_an_environment_whose_python_is_gone_is_made_anew(checkout, broken):
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    if broken == "dangling":
        python.symlink_to(checkout / "gone")
    given = commands(checkout)
    assert "python3 -m venv --clear .venv" in given and "-m pip install" in given


def test_other_pins_install_into_the_same_environment(checkout):
    (checkout / ".venv" / ".ready").unlink()
    given = commands(checkout)
    assert "-m pip install" in given and "-m venv" not in given


def test_clean_removes_what_an_installation_left_of_deleted_files(checkout):
    deleted = checkout / "build" / "lib" / "fedlora" / "deleted.py"
    deleted.parent.mkdir(parents=True)
    deleted.touch()
    subprocess.run(["make", "-C", str(checkout), "clean"], check=True, capture_output=True)
    assert not deleted.exists() and (checkout / "Makefile").exists()

"""Files of a run directory that every package reads."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.errors import InputError
from fedlora.runs import run_files

ROOT = Path(__file__).parents[3]


def git(directory, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_seen_from(package):
    """What a copy of the package says of its commit, in a process of its own."""
    code = (
        "from fedlora.runs import run_files\n"
        "print(run_files.__file__)\n"
        "print(repr(run_files._project_git('rev-parse', 'HEAD')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={"PYTHONPATH": str(package.parent), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    file, commit = done.stdout.split()
    assert Path(file).parents[1] == package
    return commit.strip("'")


@pytest.fixture
def repository(tmp_path):
    """A git repository with one commit."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    root = tmp_path / "theirs"
    root.mkdir()
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "first")
    return root


def test_a_copy_of_the_package_in_another_repository_reports_no_commit(repository):
    site = repository / ".venv" / "site-packages"
    package = shutil.copytree(ROOT / "fedlora", site / "fedlora")
    assert git(site, "rev-parse", "HEAD")  # git itself would answer there
    assert commit_seen_from(package) == ""


@pytest.mark.parametrize(
    "content", [None, b"{", b"\xff", b"[" * 100_000, b"5", b"[]", b'{"a": {"b": 1, "b": 2}}']
)
def test_a_result_that_is_missing_or_broken_is_refused_with_its_directory(tmp_path, content):
    assert not run_files.is_complete(tmp_path)
    if content is not None:
        (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(InputError, match="holds no complete run that can be read") as caught:
        run_files.read_run_file(tmp_path)
    assert str(tmp_path) in str(caught.value) and "fedlora run --resume" in str(caught.value)
    (tmp_path / "submission.json").touch()  # of a deployment
    with pytest.raises(InputError, match=f"fedlora deploy submit --name {tmp_path.name}`"):
        run_files.read_run_file(tmp_path)


def test_a_complete_run_is_read(tmp_path):
    (tmp_path / "result.json").write_text('{"rounds": 3}')
    assert run_files.is_complete(tmp_path)
    assert run_files.read_run_file(tmp_path) == {"rounds": 3}


def test_latest_points_at_the_run_that_was_started_or_resumed_last(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for name in ("one", "two", "one"):
        (runs / name).mkdir(parents=True, exist_ok=True)
        run_files.link_latest(runs / name)
        assert (runs / "latest").readlink() == Path(name)
    assert sorted(p.name for p in runs.iterdir()) == ["latest", "one", "two"]

    def impossible(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", impossible)
    run_files.link_latest(runs / "two")
    assert (runs / "latest").readlink() == Path("one")


def test_the_lines_of_a_growing_file_are_each_read_once(tmp_path):
    file = tmp_path / "rounds.jsonl"
    lines = run_files.GrowingLines(file)
    assert lines.read() == []
    file.write_bytes(b'{"round": 1}\n{"round": 2}\n{"rou')
    assert lines.read() == [{"round": 1}, {"round": 2}]
    with file.open("r+b") as opened:
        opened.write(b"x" * len('{"round": 1}'))  # no JSON: the first line is not read again
        opened.seek(0, 2)
        opened.write(b'nd": 3}\n')
    assert lines.read() == [{"round": 1}, {"round": 2}, {"round": 3}]
    assert lines.read() == [{"round": 1}, {"round": 2}, {"round": 3}]

"""The rule on imports, and what Flower must find in pyproject.toml."""

import ast
import graphlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from experiments import sweep
from fedlora.config import config

ROOT = Path(__file__).parents[1]
SIZES = ROOT / "docs" / "architecture.md"
ALLOWED = {
    "fedlora": set(),
    "client": {"fedlora"},
    "strategies": {"fedlora"},
    "server": {"strategies", "fedlora"},
    "simulation": {"server", "strategies", "client", "fedlora"},
    "deployment": {"server", "strategies", "client", "fedlora"},
    "experiments": {"simulation", "server", "strategies", "client", "fedlora"},
    "cli": {"deployment", "experiments", "simulation", "server", "strategies", "client", "fedlora"},
}
"""Each package and the packages that its files may import."""


def _files() -> dict[str, Path]:
    """Module name -> file, of all packages."""
    found = {}
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports, at its top, in a function or for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively; write the module's whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules else node.module or "")
    return names & set(modules)


def test_every_file_imports_only_the_packages_below_its_own():
    modules = _files()
    assert len(modules) > 80
    for name, path in modules.items():
        package = name.partition(".")[0]
        above = {m for m in _imports(path, modules) if m.partition(".")[0] not in ALLOWED[package]}
        above = {m for m in above if m.partition(".")[0] != package}
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_no_two_files_import_each_other_directly_or_through_others():
    modules = _files()
    graph = {name: _imports(path, modules) - {name} for name, path in modules.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' -> '.join(reversed(error.args[1]))}")


def test_a_bank_s_node_loads_no_module_of_simulations_or_experiments(modules_of_a_node):
    assert "client.training" in modules_of_a_node
    packages = {name.partition(".")[0] for name in modules_of_a_node}
    assert packages & {*ALLOWED, "datasets", "ray"} == {
        "cli",
        "deployment",
        "client",
        "fedlora",
    }


def test_flower_finds_the_demo_in_pyproject():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    flat = {k: v for k, v in app["config"].items() if not isinstance(v, dict)}
    for section, values in app["config"].items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
    assert flat == config.load(ROOT / "experiments/configs/demo.toml").flat()
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments/configs").rglob("*.toml")), ids=lambda f: f.stem
)
def test_every_ready_configuration_is_valid(file):
    config.load(file)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments/sweeps").glob("*.toml")), ids=lambda f: f.stem
)
def test_every_ready_sweep_is_valid(file):
    assert sweep.read(file)


LOADERS = ("from_pretrained", "from_config", "pipeline", "load_adapter")
"""Functions of transformers and PEFT that open a model directory."""


def loads(tree):
    """Each call of a loader: its line, and whether it says that no code of a model may run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in LOADERS:
                given = {k.arg: k.value for k in node.keywords}
                said = given.get("trust_remote_code")
                yield node.lineno, isinstance(said, ast.Constant) and said.value is False


def test_every_call_that_opens_a_model_says_that_its_code_may_not_run():
    calls = {
        f"{file.relative_to(ROOT)}:{line}": refused
        for folder in (*ALLOWED, "benchmarks", "tests")
        for file in (ROOT / folder).rglob("*.py")
        for line, refused in loads(ast.parse(file.read_text()))
    }
    assert len(calls) > 20
    assert not [place for place, refused in calls.items() if not refused]


def test_text_reaches_the_terminal_by_one_console_that_shows_it_as_it_is():
    calls = 0
    for file in (file for name in ALLOWED for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            calls += called == "print"
            if called.rpartition(".")[2] in ("Console", "Text", "from_markup", "echo"):
                assert file.name == "terminal.py", f"{file}:{node.lineno} calls {called}"
            if called == "print" and not any(k.arg == "file" for k in node.keywords):
                printed = ast.unparse(node)
                safe = ("json.dumps", "to_toml", "__version__")
                assert any(word in printed for word in safe), f"{file}:{node.lineno}: {printed}"
    assert calls > 10


ROWS = re.findall(r"\| lines of [^|]* \| ([0-9,]+) \| `(git .*wc -l)` \|", SIZES.read_text())


@pytest.mark.parametrize(("most", "command"), ROWS, ids=["source", "institution", "tests"])
def test_the_house_is_no_larger_than_its_page_says(most, command) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository, whose files are counted")
    command = command.replace("\\|", "|")
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, check=True)
    assert 1000 < int(found.stdout) <= int(most.replace(",", ""))

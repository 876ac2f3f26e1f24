"""The rule on imports, and what Flower must find in pyproject.toml."""

import ast
import tomllib
from pathlib import Path

import pytest

from experiments import sweep
from fedlora import config

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "fedlora": {"fedlora"},
    "client": {"client", "fedlora"},
    "strategies": {"strategies", "fedlora"},
    "server": {"server", "strategies", "fedlora"},
    "experiments": {"experiments", "server", "strategies", "client", "fedlora"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top not in ALLOWED or top in ALLOWED[package], f"{file} imports {name}"


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


def test_what_the_configuration_says_of_strategies_is_what_they_are():
    from strategies import STRATEGIES, base, fedavg

    choices = next(shown for key, shown, *_ in config.describe() if key == "federation.strategy")
    assert choices.split("|") == list(STRATEGIES)
    kept = {name: s.kept for name, s in STRATEGIES.items() if s.kept}
    assert kept == config.KEPT
    own = {name for name, s in STRATEGIES.items() if s.start is not base.the_global_adapter}
    assert own == set(config.MIXED_RANKS)
    means = {name for name, s in STRATEGIES.items() if s.aggregate is fedavg.aggregate}
    assert means == set(config.FACTOR_MEANS)


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
    for file in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith(("Console", "Text", "from_markup", "echo")):
                assert file.name == "terminal.py", f"{file}:{node.lineno} calls {called}"
            if called == "print" and not any(k.arg == "file" for k in node.keywords):
                printed = ast.unparse(node)
                safe = ("json.dumps", "to_toml", "__version__")
                assert any(word in printed for word in safe), f"{file}:{node.lineno}: {printed}"

"""How a run starts."""

import subprocess
import sys

from experiments import simulate

SCRIPT = """
import sys
from pathlib import Path
from experiments import cli, live, simulate
config = cli._resolve(Path(sys.argv[1]), {}, Path(sys.argv[2]), None)
print(len(simulate.prepare(config).names))
import experiments.engines.ray
heavy = {"torch", "transformers", "peft", "opacus", "datasets", "pandas", "scipy", "sklearn"}
print(sorted(heavy & set(sys.modules)))
"""


def test_a_run_with_cached_records_comes_to_its_workers_without_torch(tiny_config, tmp_path):
    config = tiny_config()
    simulate.prepare(config)
    (tmp_path / "x.toml").write_text(config.to_toml())
    arguments = [sys.executable, "-c", SCRIPT, tmp_path / "x.toml", tmp_path / "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["4", "[]"]

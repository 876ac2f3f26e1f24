"""The Flower ServerApp: read the configuration, run the rounds."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import logs
from fedlora.config.config import from_context
from fedlora.runs.run_files import alone
from server import run_directory
from server.rounds import Federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all remaining rounds. Raises on failure: Flower counts a plain exit as success."""
    if logs.wanted():
        logs.to_stderr()
    config = run_directory.with_tracking(from_context(context.run_config, context.run_id))
    with alone(Path(config.run_dir)):
        Federation(grid, config).run()

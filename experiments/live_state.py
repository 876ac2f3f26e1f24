"""What the live page shows of a run: a summary of the files in its directory."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.config import load
from fedlora.errors import InputError
from fedlora.runs.run_files import CONFIG, RESULT, ROUNDS, finite, is_complete
from server.run_directory import ORDERS, RunDirectory

FILES = (CONFIG, ORDERS, ROUNDS, RESULT)
"""Files that the summary depends on."""
PACE_ROUNDS = 10
"""Rounds whose mean time predicts the time left."""
METRICS = ("accuracy", "token_loss")


def changed(run_dir: Path) -> tuple[Any, ...]:
    """Sizes and times of change of `FILES`: equal as long as the summary stays the same."""
    found: list[Any] = []
    for name in FILES:
        try:
            status = (run_dir / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_size, status.st_mtime_ns))
    return tuple(found)


def last_change(run_dir: Path) -> float | None:
    """Seconds since one of `FILES` changed; None without any."""
    times = [entry[1] for entry in changed(run_dir) if entry]
    return max(0.0, time.time() - max(times) / 1e9) if times else None


def summary(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise a run in plain values, ready for JSON.

    Args:
        run_dir: The run's directory; it may not exist yet.
        records: The lines of its rounds.jsonl.

    Returns:
        ``name`` and ``directory``; ``stage``: ``starting``, ``rounds``, ``ending`` (institutions
        train at home, and results are written) or ``complete``. Unless the run is starting also:
        ``round`` and ``rounds`` (done, planned), ``asked`` (institutions of the round in progress),
        ``updates`` of the last round, ``seconds_left`` (None where it is not known), ``metric``
        and its ``measured`` ``[round, value]``, ``epsilon`` (the same, of rounds where one is
        known), ``limit`` (privacy.epsilon; both None without DP), and ``institutions``, a list
        sorted by name.
    """
    found: dict[str, Any] = {"name": run_dir.name, "directory": str(run_dir), "stage": "starting"}
    try:
        config = load(run_dir / CONFIG)
    except InputError:  # not accepted yet
        return found
    total = config.federation.rounds
    done, private = (records[-1]["round"] if records else 0), config.privacy.enabled
    stage = "complete" if is_complete(run_dir) else "rounds" if done < total else "ending"
    metric = next((m for m in METRICS if any(m in r["metrics"] for r in records)), None)
    measured = [[r["round"], r["metrics"][metric]] for r in records if metric in r["metrics"]]
    spent = [[r["round"], r["epsilon_max"]] for r in records if r["epsilon_max"] is not None]
    found |= {
        "stage": stage,
        "round": done,
        "rounds": total,
        "asked": sorted(RunDirectory(run_dir).asked(done + 1)) if stage == "rounds" else [],
        "updates": [records[-1]["updates"], records[-1]["asked"]] if records else None,
        "seconds_left": _seconds_left(records, total) if stage == "rounds" else None,
        "metric": metric,
        "measured": measured,
        "epsilon": spent if private else None,
        "limit": config.privacy.epsilon if private else None,
        "institutions": _institutions(records),
    }
    return finite(found)


def _seconds_left(records: Sequence[Mapping[str, Any]], total: int) -> float | None:
    last = records[-PACE_ROUNDS:]
    if not last:
        return None
    return sum(r["seconds"] for r in last) / len(last) * (total - last[-1]["round"])


def _institutions(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each institution's last figures, its number of rounds, and all bytes sent and received."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        rejected = record["aggregation"]["rejected"]
        for name, said in record["institutions"].items():
            one = found.setdefault(name, {"name": name, "rounds": 0, "sent": 0, "received": 0})
            one["rounds"] += 1
            one["sent"] += said["sent"]
            one["received"] += said["received"]
            one |= {key: said[key] for key in ("accuracy", "epsilon") if key in said}
            if name in rejected:
                one["rejected"] = f"{rejected[name]} (round {record['round']})"
    return [found[name] for name in sorted(found)]

"""``fedlora cache``: the tokenised texts that wait on this machine."""

import json
import time
from typing import Annotated

import typer

from fedlora.data import cache as records_cache
from fedlora.data import data
from fedlora.errors import InputError
from fedlora.terminal import Json, Terminal, clean_errors

app = typer.Typer()


@app.command()
@clean_errors
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries.")] = False,
    as_json: Json = False,
) -> None:
    """Show where tokenised texts of records wait, how many bytes they have, or remove them.

    A run caches its records, so that the next run on them starts faster. FEDLORA_CACHE names
    another directory.
    """
    place = data.cached_shards()
    found = records_cache.entries(place)
    size = sum(entry.size for entry in found)
    if clear:
        try:
            records_cache.clear(place)
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be removed ({error.strerror}); remove {place} as its "
                "owner"
            ) from None
    if as_json:
        entries = [{"path": str(e.path), "bytes": e.size, "used": e.used} for e in found]
        print(json.dumps({"place": str(place), "cleared": clear, "entries": entries}))
        return
    out = Terminal()
    out.write_line(f"{place}: {len(found)} entries, {size / 1e6:.1f} MB" + ", removed" * clear)
    if clear:
        return
    for entry in found:
        days = (time.time() - entry.used) / 86400
        out.write_line(
            f"{entry.path.name[:22]:22}  {entry.size / 1e6:8.1f} MB  used {days:.0f} days ago"
        )
    out.write_line(
        "A corpus holds the texts of a data set's records, as tokens; a partition says which of "
        "them each institution has in one configuration. Both are removed "
        f"{records_cache.MAX_AGE_DAYS} days after their last use; --clear removes all now."
    )

"""Write the results of sweeps and audits into docs/results.md, with figures.

Usage: python -m benchmarks.results runs/sweeps/epsilon runs/audits/demo-1 ...

Each directory is that of a `fedlora sweep` or `fedlora audit`; its part of the document is
replaced, the other parts stay. All figures come from the directories, none is typed by hand.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import pages, results, sweep_page
from experiments.audit.findings import FILE, facts
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.runs.run_files import ENVIRONMENT, commit, is_complete, read_run_file

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "results.md"
PICTURES = DOCUMENT.parent / "results"
PAGE = Path(pages.__file__).with_name("templates") / "report.html"
COLOURS = dict(re.findall(r"(--[\w-]+): (#\w+);", PAGE.read_text("utf-8").split(":root {")[1]))
"""Colours of figures outside a page: those of the page on white."""


def of_sweep(out: Path) -> str:
    """The part on a sweep; its figures are written to files."""
    sweep = results.read(out)
    about = sweep.about
    pooled, _ = results.tables(results.summary(sweep), sweep.axes)
    text = f"{results.markdown_table(pooled)}\n"
    for section in sweep_page.of(out).sections:
        for title, svg in section.figures.items():
            name = f"{about['name']}-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
            write_atomic(PICTURES / name, standing_alone(svg).encode())
            text += f"\n![{title}](results/{name})\n"
    if missing := sweep.missing:
        text += f"\n{missing} of {len(about['cases'])} cases have not run.\n"
    cells = [results.run_dir(out, c) for case in about["cases"] for c in case["cells"].values()]
    return f"{_command(about['command'])}\n\n{_where(dict.fromkeys(cells))}\n\n{text}"


def standing_alone(svg: str) -> str:
    """A page's figure as a separate file, with colours and a white background."""
    for variable, colour in COLOURS.items():
        svg = svg.replace(f"var({variable})", colour)
    head, end, rest = svg.partition(">")
    if 'xmlns="' not in head:
        head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f'{head}{end}<rect width="100%" height="100%" fill="#ffffff"/>{rest}'


def of_audit(out: Path) -> str:
    """The part on an audit."""
    found = read_run_file(out, FILE)
    made = read_run_file(out / "run", ENVIRONMENT)
    rows = [("what", "found"), *facts(found)]
    where = _where({out / "run": None})
    return f"{_command(' '.join(made['command']))}\n\n{where}\n\n{results.markdown_table(rows)}\n"


def _command(made: str) -> str:
    """The command, without the machine's own directory of results."""
    return f"`{re.sub(r' --out [^ ]+', '', made)}`"


def _where(cells: Mapping[Path, Any]) -> str:
    """Commits and processors of runs; a plus marks uncommitted changes."""
    found = [read_run_file(cell, ENVIRONMENT) for cell in cells if is_complete(cell)]
    commits = sorted({commit(one) for one in found})
    processors = sorted({str(one["processor"]) for one in found})
    return f"Commit {', '.join(commits)}; processor {', '.join(processors)}; runs: {len(found)}."


def put(name: str, text: str) -> None:
    """Replace one part of the document, or add it at its end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    document = DOCUMENT.read_text(encoding="utf-8")
    part = f"{begin}\n{text.strip()}\n{end}"
    if begin in document:
        before, _, rest = document.partition(begin)
        if end not in rest:
            raise InputError(f"{DOCUMENT} has {begin!r} without {end!r}; put it back")
        part = f"{before}{part}{rest.partition(end)[2]}"
    else:
        part = f"{document.rstrip()}\n\n## {name}\n\n{part}\n"
    write_atomic(DOCUMENT, part.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directories", type=Path, nargs="+", help="of sweeps and audits")
    PICTURES.mkdir(exist_ok=True)
    for out in parser.parse_args().directories:
        try:
            audit = (out / FILE).exists()
            name = f"Audit {out.name}" if audit else f"Sweep {results.manifest(out)['name']}"
            put(name, of_audit(out) if audit else of_sweep(out))
        except InputError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()

"""The page on an audit."""

import math
from pathlib import Path

from experiments.audit import findings
from experiments.pages import Page, Section, Table
from fedlora.rounding import at_least, at_most


def of(directory: Path) -> Page:
    """Make the page on an audit.

    Raises:
        InputError: If the audit's findings cannot be read.
    """
    found = findings.read(directory)
    promised, broken = float(found["epsilon"]), found["refuted"]
    shown, alone = findings.shown(found), found["canaries"].get(findings.ALL_BUT_ONE)
    seeded = findings.is_seeded(found)
    epsilon = "epsilon at most, were the noise secret" if seeded else "promised: epsilon at most"
    tiles = {
        epsilon: at_most(promised),
        "shown by attacks: epsilon at least": at_least(shown, 3),
        "the canaries could show at most": at_least(found["canaries"]["most they can show"], 3),
    }
    if alone is not None:
        tiles[findings.of_one(found)] = at_most(float(found["epsilon_alone"]))
        tiles["shown by attacks if they do"] = at_least(alone["epsilon"], 3)
    if broken:
        note = f"The promise is broken: {findings.broken_by(found)}."
    elif seeded:
        note = (
            "Nothing was promised, as the noise came from a seed: whoever has that can take it "
            "off. The attacks do not use the seed; of such noise drawn in secret they refute "
            "nothing."
        )
    elif not math.isfinite(promised):
        note = (
            "Nothing was promised, so there is nothing to refute. The attacks show what an "
            "attacker learns without differential privacy."
        )
    else:
        verdict = findings.verdict(found)
        note = f"The promise {verdict}. That is no proof: a better attack may show more."
    *rows, _ = findings.facts(found)
    return Page(
        title=f"Privacy audit: {directory.absolute().name}",
        opening=[
            Section(
                title="Verdict",
                note=note,
                bad=broken,
                caution=not broken and (seeded or not findings.can_refute(found)),
                words=[
                    "Rows that the auditor made (canaries) were added to the records or not, by "
                    "the toss of a coin. Attacks then guess from what the run released which were "
                    "added. Under the promise, guesses can be right only so often; more right "
                    "guesses refute it."
                ],
            ),
            Section(
                title="What the attacks found",
                tables=[Table(rows=[["attack", "finding"], *map(list, rows)])],
            ),
            Section(title="What was promised", words=[found["protects"]]),
        ],
        tiles=tiles,
        sections=[],
    )

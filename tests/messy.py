"""A file as institutions send it: semicolons, Latin-1, empty cells, institutions of one row."""

import random
from collections import Counter
from pathlib import Path

WORDS = {
    "loan": ["mortgage", "interest", "lender", "repay"],
    "Credit_Card": ["plastic", "swipe", "chargeback", "limit"],
    "credit_card": ["plastic", "swipe", "limit", "cashback"],
    "NaN": ["stolen", "phishing", "scam", "forged"],
}
LARGE = {"Crédit Nord": 120, "Sparkasse": 90, "Alpha": 70}
TINY = ["Bêta", "Gamma", "Delta", "Epsilon"]
"""Banks of one row each."""
HEADER = "narrative;kind;bank"


def messy_rows() -> list[tuple[str, str, str]]:
    """Text, label and bank of each row; some are empty."""
    draw = random.Random(3)
    rows: list[tuple[str, str, str]] = []
    for bank, count in [*LARGE.items(), *((bank, 1) for bank in TINY)]:
        for i in range(count):
            label = draw.choice(list(WORDS))
            # distinct texts, so that none is held out with a copy
            text = f"{' '.join(draw.choices(WORDS[label], k=4))} {bank} {i} café"
            rows.append((text, label, bank))
    rows += [("  ", "loan", "Alpha")] * 17
    rows += [(f"the mortgage {i}", "", "Alpha") for i in range(13)]
    rows += [(f"the interest {i}", "loan", " ") for i in range(11)]
    draw.shuffle(rows)
    return rows


def write_messy(path: Path) -> Counter[str]:
    """Write the file; the number of its rows by what they lack."""
    rows = messy_rows()
    text = "\r\n".join([HEADER, *(";".join(row) for row in rows)])
    path.write_bytes(text.encode())
    lacks = Counter[str]()
    for written, label, bank in rows:
        lacks["read"] += 1
        if not written.strip():
            lacks["no text"] += 1
        elif not label:
            lacks["no label"] += 1
        elif not bank.strip():
            lacks["no institution"] += 1
    return lacks

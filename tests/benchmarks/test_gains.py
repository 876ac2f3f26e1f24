"""README's picture of what joining gives is drawn from the tables beside it."""

import html
import re

import pytest

from benchmarks import gains
from benchmarks.gains import EIGHT, NO_DP, SECURE, Gain
from fedlora.errors import InputError

DOCUMENT = """
### By what an institution holds

| records | institutions | alone | without DP: shared, own | own minus alone | epsilon 8: shared, own | own minus alone | from noise: own | minus alone |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 40 | 4 | 65.6 | 85.3, 79.5 | +13.9 ± 11.0 | 53.5, 70.4 | **-4.8 ± 8.0** | 1.0 | +1.0 ± 1.0 |
| 40 | 16 | 66.8 | 90.4, 87.5 | +20.7 ± 8.0 | 67.2, 72.5 | +5.7 ± 7.1 | not run | |
| average | | 66.8 | 90.4, 87.5 | +20.7 ± 8.0 | 67.2, 72.5 | +5.7 ± 7.1 | not run | |

### By what an institution holds: sentences

<!-- Sweep one -->
| arm | noise | holdings | gain of joining | gain in macro-F1 |
| --- | --- | --- | --- | --- |
| federated | none | 4-hold-320 | +4.8 ± 1.5 | +4.9 ± 1.5 |
| federated-dp | shared-8 | 16-hold-1000 | -0.6 ± 3.9 | +0.6 ± 3.7 |
<!-- end of Sweep one -->
"""  # noqa: E501
ROWS = """
| records | alone | own minus alone, 95 % interval |
| --- | --- | --- |
| **demo: 39 industries** (at most 48 steps) | 85.9 | +1.1, -1.0 to 3.1 |
| the same at epsilon 1; [secure aggregation](docs) | 86.7 | **+1.6, -2.5 to 5.8** |
| the same without DP | 86.6 | +3.9, -1.2 to 9.1 |
| FPB at random | 65.4 | **+5.5, 2.3 to 8.7** |
| the same with less | 65.4 | **+5.5, 2.3 to 8.7** |
"""


def test_tables_are_read_by_their_heads():
    found = gains.by_holdings(gains.part(DOCUMENT, "### By what an institution holds"))
    assert list(found) == [40]
    assert found[40][:2] == [
        Gain(NO_DP, 13.9, pytest.approx(2.9), pytest.approx(24.9)),
        Gain(EIGHT, -4.8, pytest.approx(-12.8), pytest.approx(3.2)),
    ]
    assert [gain.mean for gain in found[40][2:]] == [20.7, 5.7]  # no average, no control
    found = gains.by_sweep(gains.part(DOCUMENT, "<!-- Sweep one -->"))
    assert found[320] == [Gain(NO_DP, 4.8, pytest.approx(3.3), pytest.approx(6.3))]
    assert [(gain.budget, gain.mean) for gain in found[1000]] == [(SECURE, -0.6)]
    with pytest.raises(InputError, match="no line is '<!-- Sweep other -->'"):
        gains.part(DOCUMENT, "<!-- Sweep other -->")


def test_rows_of_institutions_as_they_are_keep_their_name_and_others_are_left_out():
    assert gains.as_they_are(ROWS) == {
        "demo,\n39 industries": [
            Gain(EIGHT, 1.1, -1.0, 3.1),
            Gain(SECURE, 1.6, -2.5, 5.8),
            Gain(NO_DP, 3.9, -1.2, 9.1),
        ]
    }


def test_the_picture_says_what_the_tables_say():
    """`python -m benchmarks.gains` draws it anew."""
    document, readme = (file.read_text("utf-8") for file in (gains.DOCUMENT, gains.README))
    drawn = re.search(r"<desc[^>]*>(.*?)</desc>", gains.PICTURE.read_text("utf-8"), re.DOTALL)
    assert drawn and html.unescape(drawn[1]) == gains.says(gains.panels(document, readme))
    assert len(gains.panels(document, readme)["institutions as they are"]) == 3

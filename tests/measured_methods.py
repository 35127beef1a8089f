"""The methods whose figures on the packaged benchmark stand in the documentation."""

from __future__ import annotations

import re

from places import ROOT

#: Their names, from the rows of the table of figures.
MEASURED: list[str] = re.findall(
    r"^\| `(\w+)` \| \d\.\d\d \(",
    (ROOT / "docs" / "results.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)

"""Every notebook runs from top to bottom, and is kept with what it showed."""

from __future__ import annotations

import json
import re

import pytest
from places import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Bytes of a notebook with its outputs.
LARGEST = 250_000
#: Places of a machine, addresses in memory, colours of a terminal, and days.
TRACES = re.compile(
    r"(?<![\w.:/])/(?:tmp|home|root|usr|work|Users)\b|0x[0-9a-f]{6}|\x1b|20\d\d-\d\d-\d\d"
)


def texts(output):
    """All texts of an output, without pictures."""
    found = [output["text"]] if "text" in output else []
    found += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return ["".join(text) for text in found]


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def faults(notebook):
    """What is wrong with a notebook as it is kept."""
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    counts = [cell["execution_count"] for cell in cells]
    found = [] if counts == list(range(1, len(cells) + 1)) else [f"not run in order: {counts}"]
    found += [str(output["evalue"]) for output in outputs if output["output_type"] == "error"]
    found += [] if cells[-1]["outputs"] else ["the last cell shows nothing"]
    told = [text for output in outputs for text in texts(output)]
    return found + [trace[0] for text in told for trace in TRACES.finditer(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_as_it_ran(path):
    assert path.stat().st_size < LARGEST
    assert not faults(json.loads(path.read_text(encoding="utf-8"))), "run tools/notebooks.py"


def test_faults_of_a_notebook_are_seen():
    text = {"output_type": "stream", "name": "stdout", "text": ["read /home" + "/me/facts.json"]}
    fine = {"cell_type": "code", "execution_count": 1, "outputs": [{**text, "text": "facts.json"}]}
    assert not faults({"cells": [fine]})
    assert faults({"cells": [{**fine, "outputs": [text]}]}) == ["/home"]
    assert faults({"cells": [{**fine, "outputs": []}]}) == ["the last cell shows nothing"]
    assert faults({"cells": [{**fine, "execution_count": 2}]}) == ["not run in order: [2]"]
    error = {"output_type": "error", "evalue": "it broke"}
    assert faults({"cells": [{**fine, "outputs": [error]}]}) == ["it broke"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    import nbformat

    from notebooks import run, tidy

    notebook = nbformat.read(path, as_version=4)
    run(notebook, tmp_path)
    tidy(notebook)
    assert not faults(notebook)


def test_each_notebook_has_its_row():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == [p.stem for p in NOTEBOOKS]

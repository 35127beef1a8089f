"""Run notebooks and keep what they show.

``python tools/notebooks.py [NAME ...]``, all of them without a name. Each runs in an empty folder
of its own. What is kept is small and tells nothing of the machine: no times of cells, no progress,
no places of code, no warnings of other libraries.
"""

from __future__ import annotations

import argparse
import re
import resource
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
#: Seconds until a cell counts as hanging.
TIMEOUT = 1200
#: A warning of this package, or one that it gives for a cell; the place is left out.
_OURS = re.compile(r"^\S*(?:kedit_lightning|ipykernel_)\S*:\d+: (.*\n)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run(notebook: Any, folder: Path) -> None:
    """Run a notebook from top to bottom, in a folder.

    Raises:
        CellExecutionError: A cell failed.
    """
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources=where, record_timing=False
    )
    client.execute()


def said(text: str) -> str:
    r"""What this package says on standard error; what its libraries say there hangs on the machine.

    >>> said("ipykernel_7/a.py:3: EditWarning: too late\n  edit()\nLoading: 100%\n")
    'EditWarning: too late\n'
    """
    found = (_OURS.match(line) for line in text.splitlines(keepends=True))
    return "".join(own[1] for own in found if own)


def tidied(output: Any) -> Any | None:
    """An output of a cell as it is kept, if anything of it is."""
    if "text" in output:
        text = said(output["text"]) if output["name"] == "stderr" else output["text"]
        output["text"] = _COLOUR.sub("", text)
        return output if output["text"] else None
    data = output.get("data", {})
    if {"image/png", "text/markdown", "text/html"} & set(data):
        data.pop("text/plain", None)  # says less, or the same once more
    return output


def tidy(notebook: Any) -> None:
    """Tidy the outputs of a notebook that has run."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [kept for output in cell.outputs if (kept := tidied(output))]


def main() -> None:
    """Run the notebooks that are named, and write them with their outputs."""
    parser = argparse.ArgumentParser(description="Run notebooks and keep their outputs.")
    parser.add_argument("names", nargs="*", help="names of notebooks; all if none is given")
    names = parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        path = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        tidy(notebook)
        nbformat.write(notebook, path)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{name}: {seconds:.0f} s of processor time, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

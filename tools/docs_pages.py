"""Pages of the documentation that are written from the code: methods, scores, and the API.

`mkdocs.yml` names this file as a hook, so the pages are made anew whenever the documentation is
built and are never checked in.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from method_pages import overview, page
from metric_page import metrics

from kedit_lightning.registry import entries

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
#: Packages and modules of the API reference, from the lowest floor to the highest.
REFERENCE = {
    "errors": "Errors",
    "requests": "Requests, probes, examples",
    "registry": "Registry and plug-ins",
    "edits": "Edits",
    "data": "Datasets",
    "metrics": "Metrics",
    "metrics.functional": "Metrics: arithmetic",
    "base_models": "Base models",
    "statistics": "Key statistics",
    "benchmark": "Benchmarks",
    "runs": "Runs on disk",
    "methods": "Methods",
    "methods.method": "Base class of methods",
    "analysis.causal_trace": "Causal tracing",
    "callbacks": "Callbacks",
    "trainer": "Trainer",
}


def pages() -> dict[str, str]:
    """All pages that are written from the code, by their paths below ``docs/``."""
    written = {"methods/index.md": overview(), "metrics.md": metrics()}
    for name, entry in entries("method").items():
        written[f"methods/{name.lower()}.md"] = page(entry)
    for module, title in REFERENCE.items():
        written[f"api/{module}.md"] = f"# {title}\n\n::: kedit_lightning.{module}\n"
    return written


# ---- hooks of mkdocs


def on_startup(**_: Any) -> None:
    """Lay the package out as it is imported: callbacks stand at the top of the repository.

    Before any plug-in starts, since mkdocstrings looks once whether the folder is there.
    """
    package = ROOT / "build" / "docs_source" / "kedit_lightning"
    shutil.rmtree(package, ignore_errors=True)
    data = shutil.ignore_patterns("__pycache__", "nano", "nano_facts", "shapes", "shapes_facts")
    shutil.copytree(ROOT / "src" / "kedit_lightning", package, ignore=data)
    shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=data)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written from the code."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files

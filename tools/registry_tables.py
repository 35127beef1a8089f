"""Write the documentation's tables of methods, datasets and tasks from the registry.

Run ``python tools/registry_tables.py`` after a change of an entry or of what a method can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from kedit_lightning.methods import EditMethod
from kedit_lightning.registry import Entry, entries
from kedit_lightning.task_registry import tasks

DOCS = Path(__file__).parents[1] / "docs"
#: The families of methods in the order of the table, which are packages of ``methods``.
FAMILIES = ("finetune", "locate", "hypernetwork", "memory", "in_context", "decoding", "safety")
METHODS = (
    "| method | kind | GPT-2, GPT-J, GPT-Neo(X), OPT, BLOOM, Falcon | Llama, Mistral, Qwen, Gemma, "
    "Phi, OLMo | single | batch | sequential | rollback | export | `fit` learns |"
)
DATASETS = "| dataset | reads |"
TASKS = "| task | asks | data | scores of its own | sets for methods |"
#: Remarks in cells, which no declaration of a method gives.
REMARKS = {
    ("LocFTBF", "batch"): " breadth first",
    ("LocFTBF", "sequential"): " rehearses earlier facts",
    **{(name, "batch"): " by retrieval" for name in ("ICE", "IKE", "MeLLo", "PROMPT")},
    ("AlphaEdit", "sequential"): " keeps earlier facts",
    ("UltraEdit", "sequential"): " lifelong statistics",
    ("DEFER", "sequential"): " forgets, as published",
    ("MALMEN", "export"): " while thin",
    ("RLEdit", "export"): " while thin",
}
#: Methods that need several facts in an edit.
NEEDS_SEVERAL = ("UltraEdit",)


def methods_table() -> Iterator[str]:
    """Lines of the table of methods."""
    yield METHODS
    yield "|---" * (METHODS.count("|") - 1) + "|"
    methods = entries("method").values()
    for family in FAMILIES:
        yield from (_method_row(entry) for entry in methods if f".{family}." in entry.module)


def _method_row(entry: Entry) -> str:
    method: type[EditMethod] = entry.load()
    can, name = method.can, entry.name
    export = ["full model"] * can.weights + ["LoRA"] * can.adapter
    cells = {
        "method": f"`{name}`",
        "kind": entry.summary,
        "absolute positions": "✓",
        "rotary positions": "✓",
        "single": "– needs several facts" if name in NEEDS_SEVERAL else "✓",
        "batch": "✓" if can.batch else "one by one",
        "sequential": "✓" if can.sequential else "–",
        "rollback": "✓",
        "export": ", ".join(export) or "edit file",
        "fit": method.learns or "–",
    }
    return f"| {' | '.join(cell + REMARKS.get((name, key), '') for key, cell in cells.items())} |"


def datasets_table() -> Iterator[str]:
    """Lines of the table of datasets."""
    yield DATASETS
    yield "|---|---|"
    for entry in entries("dataset").values():
        yield f"| `{entry.name}` | {entry.summary} |"


def tasks_table() -> Iterator[str]:
    """Lines of the table of tasks."""
    yield TASKS
    yield "|---|---|---|---|---|"
    for task in tasks().values():
        scores = [f"`{entries('metric')[metric].load().name}`" for metric in task.metrics]
        own = [
            f"`{method}`: {', '.join(f'`{setting}`' for setting in settings)}"
            for method, settings in task.method_settings().items()
        ]
        yield (
            f"| `{task.name}` | {task.summary} | `{task.dataset}` | {', '.join(scores)} | "
            f"{'; '.join(own) or '–'} |"
        )


#: The pages with a table: its header, and what gives its lines.
TABLES: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "capabilities.md": (METHODS, methods_table),
    "datasets.md": (DATASETS, datasets_table),
    "tasks.md": (TASKS, tasks_table),
}


def with_table(name: str) -> str:
    """A page of the documentation in which the table is that of the registry."""
    header, table = TABLES[name]
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    start = lines.index(header)
    end = next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))
    lines[start:end] = table()
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for page in TABLES:
        (DOCS / page).write_text(with_table(page), encoding="utf-8")

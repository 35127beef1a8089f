"""The page that says what names of scores mean, written from the registry."""

from __future__ import annotations

import re
from inspect import cleandoc

from markdown_text import escaped

from kedit_lightning.cli.metric_glossary import metric_meanings
from kedit_lightning.registry import entries


def metrics() -> str:
    """The page that says what names of scores mean, as ``kedit metrics`` does."""
    text = "# Names of scores\n\n`kedit metrics` prints them too, with those of plug-ins.\n"
    for title, rows in metric_meanings().items():
        heading = re.split("[,;:]", title.split(". ")[-1])[0]
        text += f"\n## {heading}\n\n{escaped(title)}\n\n| name | meaning |\n|---|---|\n"
        text += "".join(f"| `{name}` | {escaped(meaning)} |\n" for name, meaning in rows.items())
    return text + metric_definitions()


def metric_definitions() -> str:
    """What each metric asks, its formula and source, which kinds of probe, range and direction."""
    text = "\n## Definitions\n"
    for entry in entries("metric").values():
        score = entry.load()
        meaning = cleandoc(score.__doc__ or "").replace("``", "")
        better = "more" if score.higher_is_better else "less"
        kinds = ", ".join(score.kinds)
        text += f"\n### `{score.name}`\n\n{escaped(meaning)}\n\n"
        of_task = f" that are of the task {' or '.join(score.tasks)}" if score.tasks else ""
        text += f"Asked of: {kinds}{of_task}. Range: {score.value_range}. Better: {better}.\n"
    return text

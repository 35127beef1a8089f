"""Pages of the documentation about methods, written from the registry.

To look at one: ``python tools/method_pages.py MEND``.
"""

from __future__ import annotations

import json
import re
import sys
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._parameter_resolvers import get_signature_parameters
from markdown_text import escaped
from papers import PAPERS

from kedit_lightning.registry import Entry, entries

ROOT = Path(__file__).parents[1]


def type_name(annotation: Any) -> str:
    """An annotation in the words of a reader: ``int or None`` instead of ``Optional[int]``.

    >>> type_name(int | None), type_name("list[int]")
    ('int or None', 'list[int]')
    """
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if getattr(annotation, "__args__", None):
        name = str(annotation)
    name = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name)
    return name.replace("NoneType", "None").replace(" | ", " or ")


def settings_table(method: type) -> str:
    """The settings of a method: name, type, default and meaning, those of its bases too."""
    lines = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    for parameter in get_signature_parameters(method, "__init__"):
        if parameter.name == "base_model":
            continue
        default = yaml.safe_dump(parameter.default, default_flow_style=True, width=1000)
        default = default.removesuffix("\n").removesuffix("\n...") if _plain(parameter) else "–"
        if "\n" in default:  # a row of a table is one line
            default = json.dumps(parameter.default)
        meaning = " ".join((parameter.doc or "").split()).replace("|", "\\|")
        lines.append(
            f"| `{parameter.name}` | {escaped(type_name(parameter.annotation))} "
            f"| `{default}` | {meaning} |"
        )
    return "\n".join(lines)


def _plain(parameter: Any) -> bool:
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    return isinstance(parameter.default, plain)


def description(method: type) -> str:
    """What a method's docstring says before its arguments, in Markdown."""
    text = re.split(r"\n(?:Args|Raises|Returns|Attributes):\n", cleandoc(method.__doc__ or ""))[0]
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text.strip())


def command(entry: Entry) -> str:
    """The command in the first line of a method's packaged config."""
    text = config(entry).read_text(encoding="utf-8")
    return text.splitlines()[0].removeprefix("#").strip()


def config(entry: Entry) -> Path:
    """The file of a packaged config."""
    return ROOT / "configs" / f"{entry.config}.yaml"


def page(entry: Entry) -> str:
    """The page of a method, in Markdown."""
    method = entry.load()
    can, needs = method.can, sorted(method.needs)
    facts = {
        "kind": entry.summary,
        "several facts at once": "yes" if can.batch else "one by one",
        "keeps earlier edits": "yes" if can.sequential else "no",
        "quantised weights": "yes" if can.quantised else "no",
        "encoder and decoder": "yes" if can.encoder_decoder else "no",
        "pictures": "yes" if can.images else "no",
        "export": ", ".join(
            ["edit file", *["LoRA adapter"] * can.adapter, *["full model"] * can.weights]
        ),
        "each request needs": ", ".join(f"`{need}`" for need in needs) or "prompt and new answer",
        "`kedit fit` learns": method.learns or "nothing",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    table = "\n".join([rows[0], "|---|---|", *rows[1:]])
    papers = "\n".join(f"- {paper}" for paper in PAPERS[entry.name])
    return f"""# {entry.name}

{description(method)}

## Paper

{papers}

## What it can do

{table}

## Command

```sh
{command(entry)}
```

## Settings

What is `null` follows the base model. Settings go into a config under `model.init_args`, on the
command line as `--model.NAME VALUE`, and in Python as arguments of `{entry.name}`.

{settings_table(method)}

## Packaged config

`{entry.config}`:

```yaml
{config(entry).read_text(encoding="utf-8").rstrip()}
```

## API

[`{entry.module}.{entry.name}`][{method.__module__}.{entry.name}]
"""


def overview() -> str:
    """The page that lists all methods."""
    rows = "\n".join(
        f"| [{name}]({name.lower()}.md) | {entry.summary} | {PAPERS[name][0]} |"
        for name, entry in entries("method").items()
    )
    return f"""# Methods

Each name is a class in `kedit_lightning.methods` and a packaged config, `-c methods/NAME`. Figures
of all methods on one benchmark stand in [results](../results.md), and what each can do
in [capabilities](../capabilities.md).

| method | what it is | paper |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    print(page(entries("method")[sys.argv[1]]))

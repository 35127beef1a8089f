"""Pages of the documentation, written from the registry: of methods, of metrics, and of the API.

`mkdocs.yml` names this file as a hook, so the pages are made anew whenever the documentation is
built and are never checked in. To look at one: ``python tools/method_pages.py MEND``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse._parameter_resolvers import get_signature_parameters

from kedit_lightning.cli.metric_glossary import metric_meanings
from kedit_lightning.registry import Entry, entries

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Args:
        title: Title of the paper.
        authors: First author, and the year.
        arxiv: Its number at arXiv.
    """

    title: str
    authors: str
    arxiv: str

    def __str__(self) -> str:
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv}) ({self.authors})"


ROME = Paper(
    "Locating and Editing Factual Associations in GPT", "Meng et al., NeurIPS 2022", "2202.05262"
)
PAPERS: dict[str, tuple[Paper, ...]] = {
    "AdaLoRA": (
        Paper(
            "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
            "Zhang et al., ICLR 2023",
            "2303.10512",
        ),
    ),
    "AlphaEdit": (
        Paper(
            "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
            "Fang et al., ICLR 2025",
            "2410.02355",
        ),
    ),
    "CaliNet": (
        Paper(
            "Calibrating Factual Knowledge in Pretrained Language Models",
            "Dong et al., Findings of EMNLP 2022",
            "2210.03329",
        ),
    ),
    "DeCo": (
        Paper(
            "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation",
            "Wang et al., ICLR 2025",
            "2410.11779",
        ),
    ),
    "DoLa": (
        Paper(
            "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
            "Chuang et al., ICLR 2024",
            "2309.03883",
        ),
    ),
    "DPOEdit": (
        Paper(
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "Rafailov et al., NeurIPS 2023",
            "2305.18290",
        ),
    ),
    "DEFER": (
        Paper(
            "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors (DEFER)",
            "Hartvigsen et al., NeurIPS 2023",
            "2211.11031",
        ),
    ),
    "EMMET": (
        Paper("A Unified Framework for Model Editing", "Gupta et al., EMNLP 2024", "2403.14236"),
    ),
    "FTL": (ROME,),
    "FTM": (
        Paper(
            "A Comprehensive Study of Knowledge Editing for Large Language Models (FT-M)",
            "Zhang et al., 2024",
            "2401.01286",
        ),
        ROME,
    ),
    "GRACE": (
        Paper(
            "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
            "Hartvigsen et al., NeurIPS 2023",
            "2211.11031",
        ),
    ),
    "ICE": (
        Paper(
            "A Comprehensive Study of Knowledge Editing for Large Language Models (ICE)",
            "Zhang et al., 2024",
            "2401.01286",
        ),
    ),
    "IKE": (
        Paper(
            "Can We Edit Factual Knowledge by In-Context Learning?",
            "Zheng et al., EMNLP 2023",
            "2305.12740",
        ),
    ),
    "InstructEdit": (
        Paper(
            "InstructEdit: Instruction-based Knowledge Editing for Large Language Models",
            "Zhang et al., IJCAI 2024",
            "2402.16123",
        ),
    ),
    "KE": (
        Paper(
            "Editing Factual Knowledge in Language Models",
            "De Cao et al., EMNLP 2021",
            "2104.08164",
        ),
    ),
    "KN": (
        Paper("Knowledge Neurons in Pretrained Transformers", "Dai et al., ACL 2022", "2104.08696"),
    ),
    "LoRA": (
        Paper(
            "LoRA: Low-Rank Adaptation of Large Language Models",
            "Hu et al., ICLR 2022",
            "2106.09685",
        ),
    ),
    "LocFTBF": (
        Paper("Fine-tuning Done Right in Model Editing", "Yang et al., 2025", "2509.22072"),
    ),
    "MALMEN": (
        Paper(
            "Massive Editing for Large Language Models via Meta Learning",
            "Tan et al., ICLR 2024",
            "2311.04661",
        ),
    ),
    "MELO": (
        Paper(
            "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA",
            "Yu et al., AAAI 2024",
            "2312.11795",
        ),
    ),
    "MEMIT": (
        Paper("Mass-Editing Memory in a Transformer", "Meng et al., ICLR 2023", "2210.07229"),
    ),
    "MEMOIR": (
        Paper(
            "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention",
            "Wang et al., 2025",
            "2506.07899",
        ),
    ),
    "MEND": (Paper("Fast Model Editing at Scale", "Mitchell et al., ICLR 2022", "2110.11309"),),
    "MeLLo": (
        Paper(
            "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions",
            "Zhong et al., EMNLP 2023",
            "2305.14795",
        ),
    ),
    "PMET": (
        Paper("PMET: Precise Model Editing in a Transformer", "Li et al., AAAI 2024", "2308.08742"),
    ),
    "PROMPT": (
        Paper(
            "Can We Edit Factual Knowledge by In-Context Learning? (PROMPT)",
            "Zheng et al., EMNLP 2023",
            "2305.12740",
        ),
    ),
    "QLoRA": (
        Paper(
            "QLoRA: Efficient Finetuning of Quantized LLMs",
            "Dettmers et al., NeurIPS 2023",
            "2305.14314",
        ),
    ),
    "RLEdit": (
        Paper(
            "Reinforced Lifelong Editing for Language Models", "Li et al., ICML 2025", "2502.05759"
        ),
    ),
    "ROME": (ROME,),
    "RROME": (
        Paper(
            "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing",
            "Gupta et al., EMNLP 2024",
            "2403.07175",
        ),
    ),
    "SERAC": (
        Paper("Memory-Based Model Editing at Scale", "Mitchell et al., ICML 2022", "2206.06520"),
    ),
    "TPatcher": (
        Paper(
            "Transformer-Patcher: One Mistake worth One Neuron",
            "Huang et al., ICLR 2023",
            "2301.09785",
        ),
    ),
    "UltraEdit": (
        Paper(
            "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
            "Gu et al., 2025",
            "2505.14679",
        ),
    ),
    "WISE": (
        Paper(
            "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing",
            "Wang et al., NeurIPS 2024",
            "2405.14768",
        ),
    ),
}
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
            f"| `{parameter.name}` | {_escaped(type_name(parameter.annotation))} "
            f"| `{default}` | {meaning} |"
        )
    return "\n".join(lines)


def _plain(parameter: Any) -> bool:
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    return isinstance(parameter.default, plain)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]|<>*_])", r"\\\1", text)


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
of all methods on one benchmark stand in the README.

| method | what it is | paper |
|---|---|---|
{rows}
"""


def metrics() -> str:
    """The page that says what names of scores mean, as ``kedit metrics`` does."""
    text = "# Names of scores\n\n`kedit metrics` prints them too, with those of plug-ins.\n"
    for title, rows in metric_meanings().items():
        heading = re.split("[,;:]", title.split(". ")[-1])[0]
        text += f"\n## {heading}\n\n{_escaped(title)}\n\n| name | meaning |\n|---|---|\n"
        text += "".join(f"| `{name}` | {_escaped(meaning)} |\n" for name, meaning in rows.items())
    return text + metric_definitions()


def metric_definitions() -> str:
    """What each metric asks, its formula and source, which kinds of probe, range and direction."""
    text = "\n## Definitions\n"
    for entry in entries("metric").values():
        score = entry.load()
        meaning = cleandoc(score.__doc__ or "").replace("``", "")
        better = "more" if score.higher_is_better else "less"
        kinds = ", ".join(score.kinds)
        text += f"\n### `{score.name}`\n\n{_escaped(meaning)}\n\n"
        of_task = f" that are of the task {' or '.join(score.tasks)}" if score.tasks else ""
        text += f"Asked of: {kinds}{of_task}. Range: {score.value_range}. Better: {better}.\n"
    return text


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
    data = shutil.ignore_patterns("__pycache__", "nano", "nano_facts")
    shutil.copytree(ROOT / "src" / "kedit_lightning", package, ignore=data)
    shutil.copytree(ROOT / "callbacks", package / "callbacks", ignore=data)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written from the code."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


if __name__ == "__main__":
    print(page(entries("method")[sys.argv[1]]))

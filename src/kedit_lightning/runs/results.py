"""What results say about the run they come from, and tables for the terminal."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import Protocol, RunContext
from kedit_lightning.benchmark.run_context import new_metrics
from kedit_lightning.decoding_settings import generation_config, in_force, set_aside
from kedit_lightning.errors import DataFileError, DataFileNotFoundError
from kedit_lightning.metrics import ExampleRecord, SummaryRow, name_id
from kedit_lightning.metrics.functional import answer_text
from kedit_lightning.metrics.retention import retention
from kedit_lightning.runs.record_lines import COSTS

_PACKAGES = ("kedit-lightning", "torch", "lightning", "transformers", "tokenizers", "peft", "numpy")
#: Of ``results.json``; a field that changes its meaning, or goes, raises it.
FORMAT = 1
#: In a table, what is asked stands in this order, and costs behind it.
_KINDS = ("rewrite", "rephrase", "portability", "locality", "edit", "timing", "memory")


def _learned(method: LightningModule) -> str | None:
    """Hash of what ``fit`` has taught a method; ``None`` when it holds nothing."""
    state = {k: t for k, t in method.state_dict().items() if isinstance(t, torch.Tensor)}
    if not state:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def run_settings(method: LightningModule, base: BaseModel, run: RunContext) -> dict[str, Any]:
    """What the results of a run depend on, as plain values; a resumed run must share it."""
    given = dict(method.hparams).items()
    settings = {k: v for k, v in given if not k.startswith("_") and k != "base_model"}
    return {
        "command": "edit" if run.editing else "test",
        "method": {
            "name": type(method).__name__,
            "settings": settings,
            "learned": _learned(method),
        },
        "base_model": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "tokenizer_fingerprint": base.tokenizer_fingerprint,
            "chat": base.encoder.chat,
            "decoding": in_force(generation_config(base.model), run.protocol.generation),
        },
        "dataset": {
            "name": type(run.data).__name__,
            **{key: run.source("test").get(key) for key in ("sha256", "records")},
        },
        "protocol": run.protocol.facts(),
        "seed": run.seed,
    }


def run_facts(
    method: LightningModule, base: BaseModel, run: RunContext, resolved: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts of a run that its results name: settings as given and as resolved, and versions."""
    facts = {"format": FORMAT, **run_settings(method, base, run)}
    facts["method"]["resolved"] = dict(resolved)
    facts["base_model"] |= {"revision": base.revision, "dtype": str(base.dtype)}
    facts["dataset"] |= run.source("test")
    facts["protocol"]["id"] = run.protocol.id
    if run.protocol.generates:
        config = generation_config(base.model)
        facts["protocol"]["set_aside"] = set_aside(config, run.protocol.generation)
    facts["metric_protocol"] = metric_protocol(run.protocol, run.seed)
    facts["versions"] = versions()
    facts["environment"] = environment(base)
    return facts


def read_results(folder: Path) -> dict[str, Any]:
    """What ``results.json`` says of a finished run.

    Raises:
        DataFileNotFoundError: The folder holds no finished run.
        DataFileError: A newer release wrote it.
    """
    path = folder / "results.json"
    if not path.is_file() or not (folder / "results.jsonl").is_file():
        raise DataFileNotFoundError(
            f"'{folder}' is not the folder of a finished run: it has no results.json; continue the "
            f"run with `kedit test --resume {folder}`, or name another folder"
        )
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format", 0) > FORMAT:
        raise DataFileError(
            f"{path} has format {facts['format']}, and this release reads formats up to {FORMAT}; "
            "update kedit-lightning"
        )
    return facts


def metric_protocol(protocol: Protocol, seed: int) -> dict[str, Any]:
    """How answers are taken and numbers summed up."""
    metrics, places = new_metrics(protocol, seed), "at the positions of the probe's answer"
    free_answers, tokens = "none", protocol.max_new_tokens
    if protocol.generates:
        places = "along its own greedy continuation"
        how = {"greedy": "greedy", "model": "by the model's generation config, never sampled"}
        free_answers = f"{how[protocol.generation]}, up to {tokens} tokens, ended by the model or "
        free_answers += "by its first "
        free_answers += f"line or sentence; compared by the rule {protocol.answers!r}"
    return {
        "scoring": protocol.scoring,
        "free_answers": free_answers,
        "locality": f"compared with the unedited base model {places}",
        "intervals": (
            f"{metrics.level:.0%}, bootstrap of {metrics.resamples} draws over subjects, "
            f"seed {metrics.seed}; Wilson's for shares where all subjects agree, "
            "Newcombe's for losses of shares"
        ),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"torch": torch.__version__}  # which names the build too


def environment(base: BaseModel) -> dict[str, Any]:
    """The machine that numbers can depend on in their last digits."""
    device = base.device
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "accelerator": accelerator,
        "cuda": torch.version.cuda if accelerator else None,
        "threads": torch.get_num_threads(),
    }


def summary_of(records: Iterable[ExampleRecord], protocol: Protocol, seed: int) -> dict[str, Any]:
    """Scores with intervals; costs that differ from run to run in blocks of their own.

    A stream with checkpoints also has a block ``retention``.
    """
    order: dict[str, None] = {}  # ids in the order of the stream
    metrics = type(new_metrics(protocol)).from_records(_noted(records, order), seed=seed)
    entries: dict[str, dict[str, float]] = {
        row.key: {"mean": row.mean, "low": row.low, "high": row.high, "n": row.n}
        for row in metrics.summary()
    }
    for key, value in metrics.compute().items():
        parent, _, name = key.rpartition("/")
        if key not in entries and parent in entries:
            entries[parent][name] = value
    blocks: dict[str, Any] = {"scores": {}, **{name: {} for name in COSTS}}
    for key, entry in entries.items():
        block, _, rest = key.partition("/")
        block, rest = (block, rest) if block in COSTS else ("scores", key)
        blocks[block][rest] = entry
    if protocol.grouping == "sequential" and protocol.every is not None:
        places = {name_id(id): place for place, id in enumerate(order, start=1)}
        blocks["retention"] = retention(metrics.gathered(), places, protocol.written_at_once)
    return blocks


def _noted(records: Iterable[ExampleRecord], ids: dict[str, None]) -> Iterator[ExampleRecord]:
    """The records; the id of each is noted when it is asked for."""
    for record in records:
        ids.setdefault(record["id"])
        yield record


def place_of_score(key: str) -> tuple[str, int, str]:
    """Where a score stands in a table: its stage, what is asked, and its name without the stage."""
    stage, name = "", key
    if found := re.match(r"(forget|final|after_\d+)/", key):
        stage, name = found[1], key.removeprefix(found[0])
    kind = name.split("/")[0]
    return stage, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), name


def is_headline(key: str) -> bool:
    """Whether a score is of neither a single group of probes nor a checkpoint of a sequence."""
    stage, _, name = place_of_score(key)
    return name.count("/") < 2 and not stage.startswith("after")


def summary_table(rows: Sequence[SummaryRow], title: str) -> Table:
    """Scores with intervals, for the terminal, without those of single groups and checkpoints."""
    table = Table(title=title, caption="`kedit metrics` says what the names mean")
    table.add_column("score", no_wrap=True)
    for name in ("mean", "95% interval", "cases"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: place_of_score(row.key)):
        if not is_headline(row.key):
            continue
        digits = ".3f" if abs(row.mean) < 1000 else ",.0f"
        interval = f"{row.low:{digits}} – {row.high:{digits}}"
        table.add_row(row.key, f"{row.mean:{digits}}", interval, str(row.n))
    return table


def predictions_table(answers: Iterable[Mapping[str, str]], edits: int) -> Table:
    """The first sentences of answers with and without ``edits`` applied edits, for the terminal."""
    table = Table(title=f"{edits} edit{'s' * (edits != 1)} applied")
    for name in ("prompt", "base", "edited"):
        table.add_column(name, overflow="fold")
    for answer in answers:
        texts = [answer["prompt"], *(answer_text(answer[name]) for name in ("base", "edited"))]
        table.add_row(*texts, style=None if answer["base"] == answer["edited"] else "bold")
    return table


def tell(sentence: str) -> None:
    """Print a sentence as it is."""
    Console().print(sentence, highlight=False, markup=False, soft_wrap=True)

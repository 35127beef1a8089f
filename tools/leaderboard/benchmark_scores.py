"""Numbers of finished cells, and which pairs of methods cannot be told apart."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark_cells import CHOICE, CONFIGS, SIZES, SUBSET_REAL_SIZE, TRIALS, Cell, Plan, methods
from benchmark_runs import finished

from kedit_lightning.analysis.comparison import Run, compared, read_run

#: Scores of the page, by what they are called; groups of locality probes are added as found.
SCORES = {
    "rewrite/gen_em": "rewrite",
    "rephrase/gen_em": "rephrase",
    "portability/gen_em": "portability",
    "locality/known": "locality: known",
    "locality/keep_top1": "locality: top 1",
    "locality/kl": "locality: KL",
}
#: Parts of retention that a page shows.
RETAINED = "rewrite/gen_em"


def collected(plan: Plan, out: Path, subset: bool) -> dict[str, Any]:
    """What the page shows of the cells that are finished, as plain values."""
    marks = {cell: finished(cell, out / "cells") for cell in plan.cells}
    done = {cell: mark for cell, mark in marks.items() if mark is not None}
    runs = {cell: _run(cell, out) for cell, mark in done.items() if "error" not in mark}
    cells, tables = [], []
    for place in dict.fromkeys((c.model, c.data, c.protocol) for c in done):
        own = [c for c in done if (c.model, c.data, c.protocol) == place]
        found = [_cell(c, done[c], runs.get(c), out) for c in own]
        cells += found
        tables.append(
            _table(place, [one["name"] for one in found], [runs[c] for c in own if c in runs])
        )
    facts = next((run.facts for run in runs.values()), {})
    return {
        "written": time.strftime("%Y-%m-%d"),
        "subset": subset,
        "sizes": {name: size[subset] for name, size in SIZES.items()},
        "real_size": SUBSET_REAL_SIZE if subset else None,
        "choice": {"facts": CHOICE[subset], "trials": TRIALS, "objective": "score"},
        "versions": facts.get("versions", {}),
        "environment": facts.get("environment", {}),
        "processor_seconds": round(sum(mark["processor_seconds"] for mark in done.values())),
        "choice_seconds": round(_choice_seconds(plan, out)),
        "missing": [cell.name for cell in plan.cells if cell not in done],
        "skipped": list(plan.skipped),
        "tables": tables,
        "cells": cells,
    }


def _run(cell: Cell, out: Path) -> Run:
    """A finished run; its label is the method's class name."""
    names = {config: name for name, config in methods().items()}
    return replace(read_run(out / "cells" / cell.name), label=names[cell.method])


def _choice_seconds(plan: Plan, out: Path) -> float:
    marks = (finished(sweep, out / "sweeps") for sweep in plan.sweeps)
    return sum(mark["processor_seconds"] for mark in marks if mark is not None)


def _cell(cell: Cell, mark: dict[str, Any], run: Run | None, out: Path) -> dict[str, Any]:
    names = {config: name for name, config in methods().items()}
    settings = CONFIGS / f"{cell.settings}.yaml"
    entry: dict[str, Any] = {
        "name": cell.name,
        "model": cell.model,
        "data": cell.data,
        "protocol": cell.protocol,
        "method": names[cell.method],
        "command": cell.command,
        "settings": _settings(settings) if cell.settings else "defaults: nothing is chosen",
        "processor_seconds": mark["processor_seconds"],
        "error": mark.get("error"),
    }
    if run is None:
        return entry
    facts, prefix = run.facts, "final/" if cell.protocol == "sequence" else ""
    entry |= {
        "protocol_id": facts["protocol"]["id"],
        "seed": facts["seed"],
        "facts": facts["dataset"]["records"],
        "data_sha256": facts["dataset"]["sha256"],
        "base_model": facts["base_model"]["fingerprint"],
        "config": (out / "cells" / cell.name / "config.yaml").read_text(encoding="utf-8"),
        "scores": {
            key.removeprefix(prefix): _score(run, key) for key in run.scores if _shown(key, prefix)
        },
        "edit_seconds": facts["timing"]["edit_seconds"]["mean"],
        "peak_bytes": mark["peak_bytes"],
        "edit_bytes": run.scores["edit/bytes"].mean if "edit/bytes" in run.scores else None,
    }
    ability = out / "cells" / cell.name / "ability_sample.json"
    entry["ability"] = json.loads(ability.read_text("utf-8")) if ability.is_file() else None
    if cell.protocol == "sequence":
        entry |= _retention(run)
    # The folder of one machine has no place on the page.
    entry["config"] = entry["config"].replace(str(out / "cells"), "runs")
    return _finite(entry)


def _settings(path: Path) -> str:
    """Settings that were chosen, in one line, with the score that chose them."""
    text = path.read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if "Best of" in line)
    chosen = next(line for line in text.splitlines() if line.startswith("# Chosen"))
    values = [line.strip() for line in text.split("init_args:\n")[1].splitlines() if line.strip()]
    return f"{', '.join(values)} ({head.removeprefix('# ')} {chosen.removeprefix('# ')})"


def _shown(key: str, prefix: str) -> bool:
    if prefix and key == "forget/rewrite/gen_em":
        return True
    if not key.startswith(prefix) or key.startswith("forget/"):
        return False
    name = key.removeprefix(prefix)
    kind, *rest = name.split("/")
    return (
        name in SCORES
        or name in ("rewrite/tf_all", "rephrase/tf_all")
        or (kind == "locality" and len(rest) == 2 and rest[1] in ("known", "keep_top1", "kl"))
    )


def _score(run: Run, key: str) -> dict[str, Any]:
    row = run.scores[key]
    found = {"mean": row.mean, "low": row.low, "high": row.high, "n": row.n}
    if key in run.spread:
        spread = run.spread[key]
        orders = {"orders": len(spread.values), "order_low": spread.low}
        found |= {**orders, "order_high": spread.high, "order_sd": spread.sd}
    return found


def _retention(run: Run) -> dict[str, Any]:
    block = run.facts.get("retention") or {}
    kept = block.get("scores", {}).get(RETAINED, {})
    ages = [{name: one[name] for name in ("from", "to", "mean")} for one in kept.get("age", [])]
    return {"retention": {"age": ages, "collapse": block.get("collapse", {}).get("at")}}


def _table(place: Sequence[str], names: list[str], runs: list[Run]) -> dict[str, Any]:
    """The scores of a table, and the pairs that each of them cannot tell apart."""
    model, data, protocol = place
    prefix = "final/" if protocol == "sequence" else ""
    table: dict[str, Any] = {
        "model": model, "data": data, "protocol": protocol, "cells": names, "alike": {},
    }  # fmt: skip
    most = Counter(run.facts["dataset"]["records"] for run in runs).most_common(1)
    # A method that had to leave out records was asked other questions.
    table["apart"] = [run.label for run in runs if run.facts["dataset"]["records"] != most[0][0]]
    runs = [run for run in runs if run.label not in table["apart"]]
    if len(runs) < 2:
        return table
    short = [
        replace(run, scores={key: row for key, row in run.scores.items() if _shown(key, prefix)},
                spread={}) for run in runs
    ]  # fmt: skip
    found = compared(short, groups=True)
    alike: dict[str, list[list[str]]] = {key.removeprefix(prefix): [] for key in found.scores}
    for one in found.differences:
        if not one.told_apart:
            alike[one.score.removeprefix(prefix)].append([one.first, one.second])
    table["alike"] = alike
    return table


def _finite(value: Any) -> Any:
    """The same with nothing that JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

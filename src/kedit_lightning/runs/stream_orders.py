"""One stream of edits in several orders, and how far its scores spread over them.

What a stream keeps depends on its order. The first order is that of the file, each further one a
permutation that follows from the seed of the run and its number, with a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from kedit_lightning.benchmark import Protocol
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.edits.edit_file import write_atomically
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import SummaryRow
from kedit_lightning.metrics.retention import Spread
from kedit_lightning.runs.html_report import html_report
from kedit_lightning.runs.record_lines import records_in

#: The file that tells the spread, in the folder of the first order.
SPREAD_FILE = "orders.json"


def orders_of(
    protocol: Protocol,
    data: LightningDataModule | None,
    output: str | Path | None,
    resume: str | Path | None,
) -> Iterator[tuple[Protocol, str | Path | None, str | Path | None]]:
    """The runs of a protocol, one for each order: protocol, new folder, folder to be continued.

    Raises:
        UnsupportedUseError: There are several orders, and the examples come from no data module
            that can put them in order.
    """
    if protocol.orders > 1 and not isinstance(data, EditDataModule):
        raise UnsupportedUseError(
            "protocol.orders puts the examples of a data module of kedit_lightning.data in other "
            "orders; give one, or leave orders out (--trainer.protocol.orders)"
        )
    yield protocol, output, resume
    top = output if resume is None else resume
    for order in range(protocol.order + 1, protocol.order + protocol.orders):
        own = replace(protocol, order=order)
        folder = None if top is None else Path(top).expanduser() / "orders" / str(order)
        started = folder is not None and (folder / "run.json").is_file()
        yield own, None if started else folder, folder if started else None


def spreads(orders: Sequence[Sequence[SummaryRow]]) -> dict[str, Spread]:
    """How each score spreads over at least two orders that all have it; costs are left out."""
    means = [{row.key: row.mean for row in rows} for rows in orders]
    found = {}
    for key in means[0]:
        if key.startswith(("timing/", "memory/")) or not all(key in order for order in means):
            continue
        values = [order[key] for order in means]
        found[key] = Spread(fmean(values), stdev(values), min(values), max(values), values)
    return found


@rank_zero_only
def tell_spread(
    orders: Sequence[Sequence[SummaryRow]], folder: str | Path | None, verbose: bool
) -> None:
    """Write the spread over several orders into the folder and page of the first one; show it."""
    if len(orders) < 2:
        return
    found = spreads(orders)
    if folder is not None:
        _write(Path(folder).expanduser(), found)
    if verbose:
        Console().print(spread_table(found))


def _write(folder: Path, found: Mapping[str, Spread]) -> None:
    content = {"spread": {key: spread._asdict() for key, spread in found.items()}}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / SPREAD_FILE, text.encode("utf-8"))
    results = folder / "results.json"
    if results.is_file():  # the page of the first order was written before the others had run
        facts = json.loads(results.read_text(encoding="utf-8"))
        records = records_in(folder)
        page = html_report(facts, facts["scores"], records, facts.get("retention"), found)
        write_atomically(folder / "report.html", page.encode("utf-8"))


def read_spreads(folder: Path) -> dict[str, Spread]:
    """The spreads of a run; none where it had one order."""
    path = folder / SPREAD_FILE
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: Spread(**spread) for key, spread in content["spread"].items()}


def spread_table(found: Mapping[str, Spread]) -> Table:
    """Scores at the end of a stream over its orders, for the terminal."""
    count = max((len(spread.values) for spread in found.values()), default=0)
    table = Table(title=f"spread over {count} orders of the stream")
    table.add_column("score", no_wrap=True)
    for name in ("mean", "sd", "least", "most"):
        table.add_column(name, justify="right")
    for key, spread in sorted(found.items()):
        if key.startswith(("final/", "forget/")) and key.count("/") == 2:
            table.add_row(key, *(f"{number:.3f}" for number in spread[:4]))
    return table

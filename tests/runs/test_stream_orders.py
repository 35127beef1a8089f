"""A stream in several orders: each ends like a run of its own, and the results tell the spread."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from run_folders import assert_equal, content
from support import tiny_base
from toys import Toy

from kedit_lightning import EditTrainer
from kedit_lightning.analysis.comparison import compared, read_run
from kedit_lightning.analysis.comparison_tables import cell, csv_table
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import SummaryRow
from kedit_lightning.runs import OutputFolder
from kedit_lightning.runs.stream_orders import orders_of, spreads

CITIES = ("Lyon", "Paris", "Berlin", "Warsaw", "Norway")


def run(folder: Path, resume: bool = False, **settings: Any) -> list[Any]:
    path = folder.parent / "facts.json"
    named = [{"prompt": f"The tower of {city} is in", "target_new": "Rome", "id": city}
             for city in CITIES]  # fmt: skip
    path.write_text(json.dumps(named))
    protocol = Protocol(mode="sequential", chunk_size=2, max_new_tokens=3, **settings)
    trainer = EditTrainer(accelerator="cpu", protocol=protocol)
    where = {"resume" if resume else "output": folder}
    found = trainer.test(
        Toy(base_model=tiny_base("llama"), noise=0.3), Requests(path), verbose=False, **where
    )
    assert trainer.protocol is protocol
    return found


def ids(folder: Path) -> list[str]:
    return [line["id"] for line in content(folder)["lines"] if line["stage"] == "immediate"]


@pytest.mark.slow
def test_orders_are_runs_of_their_own_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(tmp_path / "whole", orders=3)
    whole = tmp_path / "whole"
    folders = [whole, whole / "orders/1", whole / "orders/2"]
    orders = [ids(folder) for folder in folders]
    assert orders[0] == list(CITIES)
    assert all(sorted(order) == sorted(CITIES) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    # A single order is the same run.
    run(tmp_path / "alone", order=2)
    assert_equal(content(tmp_path / "alone"), content(folders[2]))
    run(tmp_path / "plain")
    assert_equal(content(tmp_path / "plain"), content(whole))
    # The spread is that of the means.
    spread = json.loads((whole / "orders.json").read_text())["spread"]["final/rewrite/nll"]
    means = [content(f)["results"]["scores"]["final/rewrite/nll"]["mean"] for f in folders]
    assert spread["values"] == pytest.approx(means)
    assert "several orders" in (whole / "report.html").read_text()
    assert spread["sd"] == pytest.approx(stdev(means)) != 0
    assert (spread["low"], spread["high"]) == pytest.approx((min(means), max(means)))
    assert [scores["final/rewrite/nll"] for scores in found] == pytest.approx(means, rel=1e-5)

    class Broken(BaseException):
        pass

    append, written = OutputFolder.append, list[int]()

    def breaking(self: OutputFolder, record: Any) -> None:
        append(self, record)
        written.append(1)
        if len(written) == 13:  # in the second order
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "append", breaking)
        with pytest.raises(Broken):
            run(tmp_path / "broken", orders=3)
    assert not (tmp_path / "broken/orders.json").exists()
    run(tmp_path / "broken", resume=True, orders=3)
    for folder in ("", "orders/1", "orders/2"):
        assert_equal(content(tmp_path / "broken" / folder), content(whole / folder))
    names = [tmp_path / name / "orders.json" for name in ("broken", "whole")]
    assert names[0].read_text() == names[1].read_text()
    # A comparison shows it.
    comparison = compared([read_run(whole), read_run(tmp_path / "plain")])
    assert comparison.spread["final/rewrite/nll"]["whole"].values == spread["values"]
    rows = csv.DictReader(csv_table(comparison).splitlines())
    row = next(row for row in rows if (row["score"], row["run"]) == ("final/rewrite/nll", "whole"))
    assert float(row["order_sd"]) == spread["sd"]


def test_the_spread_of_scores_that_all_orders_have() -> None:
    orders = [
        [SummaryRow("final/rewrite/tf_all", mean, 0.0, 1.0, 4), SummaryRow("timing/x", 1, 1, 1, 4)]
        for mean in (0.25, 0.75)
    ]
    orders[0].append(SummaryRow("rewrite/nll", 1.0, 1.0, 1.0, 4))
    (spread,) = spreads(orders).values()
    assert spread == (0.5, stdev([0.25, 0.75]), 0.25, 0.75, [0.25, 0.75])
    assert cell(orders[0][0], spread).endswith("; 2 orders 0.250 – 0.750, sd 0.354")


def test_orders_are_of_streams_of_data_that_can_be_put_in_order(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedUseError, match="orders only means something in sequential"):
        Protocol(orders=2)
    with pytest.raises(UnsupportedUseError, match="order must be a whole number"):
        Protocol(mode="sequential", order=-1)
    several = Protocol(mode="sequential", orders=2)
    assert several.id == Protocol(mode="sequential").id
    assert several.id != Protocol(mode="sequential", order=1).id
    with pytest.raises(UnsupportedUseError, match="data module"):
        list(orders_of(several, None, None, None))
    with pytest.raises(UnsupportedUseError, match="kedit test"):
        several.for_editing(batch=True, sequential=True, examples=3)
    found = list(orders_of(several, Requests(tmp_path / "facts.json"), tmp_path, None))
    assert [(p.order, output) for p, output, _ in found] == [
        (0, tmp_path), (1, tmp_path / "orders/1")]  # fmt: skip

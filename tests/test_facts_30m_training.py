"""The training of ``facts-30m``: choice of facts, rows, and a run that goes on."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

FACTS = ROOT / "src/kedit_lightning/data/nano_facts"
NANO = ROOT / "src/kedit_lightning/base_models/nano"


@pytest.fixture(scope="module")
def tools():
    """The scripts as modules, without a trace in ``sys`` afterwards."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(ROOT / "tools/facts_30m"))
    yield SimpleNamespace(
        **{n: importlib.import_module(n) for n in ("prepare", "row_pool", "train")}
    )
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(ROOT / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a few facts of two relations."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    shutil.copy(FACTS / "templates.json", folder)
    lines = (FACTS / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [x for x in lines if json.loads(x)["relation"] in ("capital", "religion")]
    (folder / "facts.jsonl").write_text("\n".join(kept[:40]) + "\n", encoding="utf-8")
    (folder / "text.txt").write_text("Some plain words that stand between the facts here.\n" * 9)
    return folder


def test_no_answer_exceeds_its_share(tools):
    candidates = {f"S{i}": {"religion": "A" if i < 90 else "BCDE"[i % 4]} for i in range(170)}
    candidates["S7"]["capital"] = "X"  # a subject of two facts keeps both
    kept = tools.prepare.balanced(candidates, random.Random(0))
    counts = Counter(facts["religion"] for facts in kept.values())
    assert counts == {"A": 26, "B": 20, "C": 20, "D": 20, "E": 20}
    assert kept["S7"] == {"religion": "A", "capital": "X"}


def test_subjects_are_drawn_with_all_their_facts(tools):
    facts = {f"S{i}": {"religion": "A", **({"capital": "X"} if i % 3 else {})} for i in range(30)}
    kept = tools.prepare.some_subjects(facts, 12, random.Random(0))
    assert sum(map(len, kept.values())) in (12, 13)
    assert all(kept[subject] == facts[subject] for subject in kept)
    assert kept == tools.prepare.some_subjects(facts, 12, random.Random(0))
    assert tools.prepare.some_subjects(facts, 999, random.Random(0)) == facts


def test_rows_follow_from_the_seed(tools, prepared):
    def rows(seed, number=0):
        pool = tools.row_pool.RowPool(prepared, "cpu", seed, capacity=400_000, least=100_000)
        torch.manual_seed(seed)
        pool.begin_at(number)
        pool.fill()
        return pool, [pool.take(512) for _ in range(3)]

    pool, first = rows(0)
    again, other = rows(0)[1], rows(1)[1]
    for pair, same in zip(first, again, strict=True):
        assert all(map(torch.equal, pair, same))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], rows(0, number=7)[1][0][0])  # those of a run that goes on
    for ids, labels in first:
        carries = labels != -100
        assert ids.shape == labels.shape
        assert torch.equal(ids[carries], labels[carries])
        assert 0 < carries.sum() <= ids.numel()
    pool.fill(near=True)  # the pool is another one, with longer rows
    assert max(pool.take(512)[0].shape[1] for _ in range(40)) == 250


def test_a_run_goes_on_where_it_ended(tools, prepared, tmp_path):
    def run():
        torch.manual_seed(0)
        return tools.train.Run(tools.train.build_model(4096, 1, 64), "cpu", 1e-2, minutes=1)

    draws = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 4000, (4, 16), generator=draws) for _ in range(6)]
    whole, half = run(), run()
    for ids in rows:
        whole.spent += 9
        expected = whole.step(ids, ids)
    for ids in rows[:3]:
        half.spent += 9
        half.step(ids, ids)
    half.save_state(tmp_path / "state")
    later = run()
    later.load_state(tmp_path / "state")
    assert (later.steps, later.spent) == (3, 27)
    for ids in rows[3:]:
        later.spent += 9
        found = later.step(ids, ids)
    assert torch.equal(found, expected)


def test_a_short_training_writes_a_folder_of_16_bit_weights(tools, prepared, tmp_path):
    options = argparse.Namespace(prepared=prepared, output=tmp_path, device="cpu", state=None,
                                 batch_tokens=512, report_seconds=60.0)  # fmt: skip
    torch.manual_seed(0)
    model = tools.train.build_model(4096, 1, 64)
    run = tools.train.Run(model, "cpu", 3e-3, minutes=0.005)
    pool = tools.row_pool.RowPool(prepared, "cpu", capacity=400_000, least=50_000)
    tools.train.train(run, pool, options, tools.train.Reporter(tmp_path))
    told = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert told["step"] == run.steps > 0
    assert run.progress == 1
    assert {"train_1", "held_out_1", "held_out_2"} <= set(told)
    saved = type(model).from_pretrained(tmp_path)
    assert saved.dtype == torch.float16
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].half())
    assert not Path(tmp_path / "generation_config.json").exists()

"""FT-L: the box around the weights, its default, and the objective of released code."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning.methods import FTL, FTM
from kedit_lightning.methods.finetune.ftl import usual_box
from kedit_lightning.methods.shared.published_settings import published_tables


@pytest.mark.parametrize("requests", [REQUESTS[:1], REQUESTS])
def test_no_entry_leaves_the_box(requests):
    base = tiny_base("gpt2")
    edit = FTL(base_model=base, lr=1e-2, steps=4, norm_constraint=1.5e-2).edit(requests)
    for delta in edit.deltas().values():
        assert 1.5e-2 * (1 - 1e-6) <= delta.abs().max() <= 1.5e-2 * (1 + 1e-6)


def test_it_is_ft_m_inside_a_box():
    base = tiny_base("llama")
    settings = {"base_model": base, "lr": 1e-2, "steps": 4, "norm_constraint": 2e-2}
    found, expected = (kind(**settings).edit(REQUESTS).deltas() for kind in (FTL, FTM))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_objective_of_released_code_reads_one_position(legacy):
    base = tiny_base("llama")
    settings = {"base_model": base, "lr": 1e-2, "steps": 4, "norm_constraint": 2e-2}
    objective = "prompt_last" if legacy else "target_new"
    for requests in (REQUESTS[:1], REQUESTS):
        found = FTL(**settings, legacy_easyedit_objective=legacy).edit(requests).deltas()
        expected = FTM(**settings, objective=objective).edit(requests).deltas()
        other = FTL(**settings, legacy_easyedit_objective=not legacy).edit(requests).deltas()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not all(torch.equal(found[name], other[name]) for name in other)


def test_there_is_a_box_on_every_model(monkeypatch):
    for table in published_tables()["FTL"].values():
        assert table.get("norm_constraint", 1.0) <= 1.0
    base = tiny_base("gpt2")
    unknown = FTL(base_model=base)
    unknown.configure_model()
    assert unknown.settings.norm_constraint == usual_box(32)
    published = {"layers": [1], "norm_constraint": 5e-4}
    monkeypatch.setitem(published_tables()["FTL"], ("gpt2", 4, 32), published)
    known = FTL(base_model=base)
    known.configure_model()
    assert (known.settings.norm_constraint, known.settings.layers) == (5e-4, [1])
    assert known.settings.steps == 25


def test_the_usual_box_is_the_published_one_of_known_sizes():
    for (_, _, width), values in published_tables()["FTL"].items():
        if "norm_constraint" in values:
            assert usual_box(width) == pytest.approx(values["norm_constraint"], rel=0.3)

"""The LoRA method of ``examples/``: a method of one's own on the shared training loop."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraModel
from places import ROOT
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, Edit, EditRequest

PATH = ROOT / "examples" / "lora_method.py"


@pytest.fixture(scope="module")
def lora_type():
    spec = importlib.util.spec_from_file_location("lora_method", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRA


def answer_logits(base, requests):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    with torch.no_grad():
        return base.answer_logits(rows), rows


def tree(model):
    return [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]


def test_it_is_short():
    assert len(PATH.read_text().splitlines()) <= 60


def test_it_writes_facts_into_the_packaged_model(lora_type):
    base = BaseModel.load("nano")
    fact = EditRequest("The capital of France is", "Lyon", subject="France")
    before, rows = answer_logits(base, [fact])
    target = rows.answer_ids[rows.answer_mask]
    assert (before.argmax(-1)[rows.answer_mask] != target).any()
    with lora_type(base_model=base).edit([fact]):
        after, _ = answer_logits(base, [fact])
        assert torch.equal(after.argmax(-1)[rows.answer_mask], target)
    assert torch.equal(answer_logits(base, [fact])[0], before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_equals_pefts_own_forward_and_leaves_the_modules(lora_type, kind, monkeypatch, tmp_path):
    base = tiny_base(kind, torch.float32)
    before, modules = answer_logits(base, REQUESTS)[0], tree(base.model)
    trainable = [p.requires_grad for p in base.model.parameters()]
    of_peft = []
    unload = LoraModel.unload

    def record(self):
        of_peft.append(answer_logits(base, REQUESTS)[0])
        return unload(self)

    monkeypatch.setattr(LoraModel, "unload", record)
    lora = lora_type(base_model=base, rank=4)  # peft then scales by 2
    edit = lora.edit(REQUESTS)
    assert tree(base.model) == modules
    assert [p.requires_grad for p in base.model.parameters()] == trainable
    assert torch.equal(answer_logits(base, REQUESTS)[0], before)
    with edit:
        after = answer_logits(base, REQUESTS)[0]
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, of_peft[0], rtol=0, atol=1e-5)
    assert torch.equal(answer_logits(base, REQUESTS)[0], before)
    assert lora.edit(REQUESTS).id == edit.id  # peft's random numbers follow the seed
    with Edit.load(edit.save(tmp_path / "lora.safetensors"), base):
        assert torch.equal(answer_logits(base, REQUESTS)[0], after)


def test_it_trains_on_top_of_the_stack(lora_type):
    base = tiny_base("llama", torch.float32)
    lora = lora_type(base_model=base, rank=4)  # peft then scales by 2
    alone = lora.edit(REQUESTS[1:2])
    with lora.edit(REQUESTS[:1]) as first:
        second = lora.edit(REQUESTS[1:2])
        assert second.origin.stack == (first.id,)
    name = next(iter(alone.factors))
    assert not torch.equal(second.factors[name].b, alone.factors[name].b)


def test_a_failing_fit_leaves_no_adapter_behind(lora_type, monkeypatch):
    base = tiny_base("llama", torch.float32)
    modules = tree(base.model)
    monkeypatch.setattr(BaseModel, "answer_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora_type(base_model=base).edit(REQUESTS)
    assert tree(base.model) == modules

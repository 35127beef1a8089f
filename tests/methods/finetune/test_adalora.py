"""AdaLoRA: its schedule and budget, its penalty against peft's own, and LoRA as a special case."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, LoraModel, get_peft_model
from support import FAMILIES, REQUESTS, tiny_base, tiny_model

from kedit_lightning.edits import AdapterEdit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import AdaLoRA
from kedit_lightning.methods.finetune.adalora import orthogonality
from kedit_lightning.methods.finetune.shared.adapter_training import ADAPTER, adapter_training
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune
from kedit_lightning.methods.shared.gradient_factors import answer_loss

# peft asks for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
SMALL = {"rank": 2, "initial_rank": 4, "lr": 1e-2, "steps": 6}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_training_ends_at_the_budget(kind, steps):
    base = tiny_base(kind)
    method = AdaLoRA(base_model=base, **{**SMALL, "steps": steps})
    edit = method.edit(REQUESTS[:2])
    ranks = edit.origin.notes["ranks"]
    assert sum(ranks.values()) == 2 * len(method.modules_trained)
    assert ranks == {name: delta.rank for name, delta in edit.factors.items()}
    assert all(ranks.values())  # a projection without rank is left out
    assert edit.origin.notes["epochs"] == steps


def test_the_rank_shrinks_by_the_published_schedule(monkeypatch):
    base, seen = tiny_base("llama"), {}
    after_step = AdaLoRA.after_step

    def record(self, adapter, step):
        after_step(self, adapter, step)
        values = [layer.lora_E[ADAPTER] for layer in adapter.layers.values()]
        seen[step] = sum(int((value != 0).sum()) for value in values)

    monkeypatch.setattr(AdaLoRA, "after_step", record)
    AdaLoRA(base_model=base, **{**SMALL, "steps": 20}).edit(REQUESTS[:1])
    whole, budget = 4 * 8, 2 * 8  # of eight projections
    assert seen[1] == seen[2] == whole  # the first tenth
    for step in range(3, 15):  # up to the last three tenths the rest falls with the cube
        left = 1 - (step - 2) / (20 - 6 - 2)
        assert seen[step] == int((whole - budget) * left**3 + budget), step
    assert seen[14] == budget


def test_the_penalty_is_pefts_own():
    base = tiny_base("llama")
    method = AdaLoRA(base_model=base, orthogonality=0.7, **SMALL)
    method.configure_model()
    config = method.config(10)
    generator = torch.Generator().manual_seed(0)
    with adapter_training(
        base.model, method.modules_trained, method.tuner, config, generator
    ) as adapter:
        found = method.penalty(adapter)
        factors = {
            n: (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for n, layer in adapter.layers.items()
        }
        rows = base.rows(["The capital of"], ["Rome"])
        plain = base.forward(rows, labels=rows.inputs["input_ids"]).loss
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        target_modules=["q_proj", "v_proj"],
        orth_reg_weight=0.7,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(tiny_model("llama"), config).eval()
    with torch.no_grad():
        for name, (q, p) in factors.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A["default"].copy_(q)
            layer.lora_B["default"].copy_(p)
    whole = wrapped(**rows.inputs, labels=rows.inputs["input_ids"]).loss
    # transformers computes its loss in float32
    assert float(found.detach()) == pytest.approx(float((whole - plain).detach()), abs=1e-5)
    assert float(found.detach()) > 0.1


def test_orthogonality_is_the_distance_from_the_identity():
    assert orthogonality(torch.eye(3, 5, dtype=torch.float64)) == 0
    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert orthogonality(rows) == 3  # of [[4, 0], [0, 1]] from the identity


def test_without_sharing_out_it_is_lora_in_other_factors():
    """Both add ``B A`` with one learning rate where the singular values are 1 and stay."""
    base = tiny_base("llama")
    names = ["model.layers.1.mlp.down_proj"]
    generator = torch.Generator().manual_seed(0)
    method = AdaLoRA(base_model=base, rank=2, initial_rank=4, dropout=0.0)
    method.configure_model()
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    deltas = []
    for adaptive in (True, False):
        config = method.config(9) if adaptive else LoraConfig(r=4, lora_alpha=32 * 4 / (4 + 1e-5))
        tuner = method.tuner if adaptive else LoraModel
        with adapter_training(base.model, names, tuner, config, generator) as adapter:
            layer = adapter.layers[names[0]]
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            a, b = (a, b) if adaptive else (a.weight, b.weight)
            with torch.no_grad():
                numbers = torch.Generator().manual_seed(1)
                for factor in (a, b):
                    values = torch.randn(factor.shape, generator=numbers, dtype=factor.dtype)
                    factor.copy_(0.1 * values)
                if adaptive:
                    layer.lora_E[ADAPTER].fill_(1.0)
            order = torch.Generator().manual_seed(0)
            fine_tune([a, b], 1, lambda _: answer_loss(base, rows).mean(), order, lr=1e-2, epochs=4)
            found = (
                method.factors(layer)
                if adaptive
                else (a.detach(), b.detach() * layer.scaling[ADAPTER])
            )
        deltas.append(AdapterEdit(base, {names[0]: found}).factors[names[0]].dense)
    torch.testing.assert_close(*deltas, rtol=0, atol=1e-9)


def test_the_edit_is_the_adapter_that_was_trained(monkeypatch):
    base = tiny_base("gpt2")
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    before, seen = base.answer_logits(rows), []
    factors = AdaLoRA.factors

    def look(self, layer):
        layer.lora_dropout.eval()
        found = factors(self, layer)
        seen.append(base.answer_logits(rows))  # the last time, dropout is off everywhere
        return found

    monkeypatch.setattr(AdaLoRA, "factors", look)
    with AdaLoRA(base_model=base, **SMALL).edit(REQUESTS):
        after = base.answer_logits(rows)
    torch.testing.assert_close(after, seen[-1], rtol=0, atol=1e-9)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(base.answer_logits(rows), before)


def test_it_needs_rank_to_take_away_and_steps_to_do_so():
    base = tiny_base("llama")
    with pytest.raises(UnsupportedUseError, match=r"initial_rank \(3\) must be above rank \(3\)"):
        AdaLoRA(base_model=base, rank=3, initial_rank=3).configure_model()
    with pytest.raises(UnsupportedUseError, match="at least two steps"):
        AdaLoRA(base_model=base, steps=1).edit(REQUESTS[:1])
    AdaLoRA(base_model=base, steps=1, lr=1e-3).edit(REQUESTS[:2])  # a step for each

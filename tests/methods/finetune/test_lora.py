"""LoRA against plain peft, its gradients at the start, and what it leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from held_models import offloaded_to_memory
from peft import LoraConfig, LoraModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support import FAMILIES, REQUESTS, tiny_base, tiny_tokenizer
from tiny_decoders import tiny_decoder

from kedit_lightning import BaseModel
from kedit_lightning.errors import ModuleNotLocatedError, UnsupportedUseError
from kedit_lightning.methods import LoRA
from kedit_lightning.methods.finetune.shared.adapter_training import (
    adapter_training,
    scaled_factors,
)
from kedit_lightning.methods.shared.gradient_factors import answer_loss
from kedit_lightning.methods.shared.published_settings import published_tables

# peft asks for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TARGETS = {"gpt2": "c_attn", "llama": "v_proj", "gpt_neox": "query_key_value"}


def answered(base, requests=REQUESTS):
    return base.rows([r.prompt for r in requests], [r.target_new for r in requests])


def tree(model):
    return [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]


def training(base, names, dropout=0.0, seed=0):
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=dropout)
    generator = torch.Generator().manual_seed(seed)
    return adapter_training(base.model, names, LoraModel, config, generator)


@pytest.mark.parametrize("kind", FAMILIES)
def test_equals_a_training_with_plain_peft(kind):
    base = tiny_base(kind)
    lora = LoRA(base_model=base, rank=3, dropout=0.0, lr=1e-2, steps=4, batch_size=4, stop_loss=0.0)
    edit = lora.edit(REQUESTS)
    model = copy.deepcopy(base.model)
    torch.manual_seed(lora.generator(REQUESTS, "factors").initial_seed())
    targets = lora.settings.target_modules
    assert TARGETS[kind] in targets
    config = LoraConfig(r=3, lora_alpha=32.0, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    wrapped = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        losses = []
        for request in REQUESTS:
            rows = answered(base, [request])
            logits = wrapped(**rows.inputs).logits[0, int(rows.prompt_end[0]) : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, rows.answer_ids[0]))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert found.keys() == edit.factors.keys()
    for name, layer in found.items():
        delta = edit.factors[name].dense
        wanted = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 32 / 3
        assert delta.abs().max() > 1e-2
        torch.testing.assert_close(delta, wanted.detach(), rtol=0, atol=1e-9)


def test_the_start_changes_nothing_and_only_b_has_a_gradient():
    base = tiny_base("llama")
    (name,) = names = ["model.layers.1.mlp.down_proj"]
    rows, module = answered(base), base.module(names[0])
    before = base.answer_logits(rows)
    weight = module.weight.detach().clone().requires_grad_()
    with training(base, names) as adapter:
        assert torch.equal(base.answer_logits(rows), before)
        loss = answer_loss(base, rows).mean()
        layer = adapter.layers[name]
        a, b = layer.lora_A["edit"].weight, layer.lora_B["edit"].weight
        assert {id(t) for t in adapter.tensors} == {id(a), id(b)}
        of_a, of_b = torch.autograd.grad(loss, [a, b])
    handle = module.register_forward_hook(lambda m, args, out: args[0] @ weight.T)
    try:
        (of_weight,) = torch.autograd.grad(answer_loss(base, rows).mean(), weight)
    finally:
        handle.remove()
    assert not of_a.any()
    # One step of gradient descent on B is therefore -lr * scale * G A^T.
    torch.testing.assert_close(of_b, 4 * of_weight @ a.detach().T, rtol=0, atol=1e-10)
    assert of_b.abs().max() > 1e-3


def test_dropout_acts_in_training_alone():
    base = tiny_base("llama")
    names = ["model.layers.1.mlp.down_proj"]
    rows = answered(base)
    with training(base, names, dropout=0.5) as adapter, torch.no_grad():
        layer = adapter.layers[names[0]]
        layer.lora_B["edit"].weight.normal_()
        one, other = base.answer_logits(rows), base.answer_logits(rows)
        layer.lora_dropout.eval()
        still = base.answer_logits(rows)
        a, b = scaled_factors(layer)
    assert not torch.equal(one, other)
    edit = LoRA(base_model=base, dropout=0.5, lr=1e-2, steps=2).edit(REQUESTS[:2])
    with edit:
        assert torch.equal(base.answer_logits(rows), base.answer_logits(rows))
    with type(edit)(base, {names[0]: (a, b)}):
        torch.testing.assert_close(base.answer_logits(rows), still, rtol=0, atol=1e-10)


def test_an_edit_follows_from_seed_and_requests_and_leaves_torchs_numbers_alone():
    base = tiny_base("gpt2", torch.float32)
    settings = {"dropout": 0.5, "lr": 1e-2, "steps": 2}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = LoRA(base_model=base, **settings).edit(REQUESTS)
    assert torch.equal(torch.rand(3), expected)
    assert LoRA(base_model=base, **settings).edit(REQUESTS).id == one.id
    assert LoRA(base_model=base, seed=1, **settings).edit(REQUESTS).id != one.id


def test_no_module_of_the_model_is_changed_whatever_happens():
    base = tiny_base("gpt2", torch.float32)
    modules, rows = tree(base.model), answered(base)
    before = base.answer_logits(rows)
    LoRA(base_model=base, steps=2).edit(REQUESTS)
    assert tree(base.model) == modules
    names = ["transformer.h.0.attn.c_attn", "transformer.h.0.ln_1"]
    with (
        pytest.raises(UnsupportedUseError, match=r"no adapter around.*LayerNorm"),
        training(base, names),
    ):
        raise AssertionError("peft took a norm")
    with pytest.raises(ZeroDivisionError), training(base, names[:1]):
        assert 1 / (not isinstance(base.module(names[0]), LoraLayer))
    assert tree(base.model) == modules
    assert not hasattr(base.model, "peft_config")
    assert torch.equal(base.answer_logits(rows), before)


def test_half_precision_weights_get_factors_in_single_precision():
    base = tiny_base("llama", torch.bfloat16)
    edit = LoRA(base_model=base, lr=1e-3, steps=3).edit(REQUESTS[:1])
    for a, b in edit.factors.values():
        assert a.dtype == b.dtype == torch.float32
        assert b.any()


def test_offloaded_weights_give_the_same_factors():
    plain, base = tiny_base("llama", torch.float32), tiny_base("llama", torch.float32)
    offloaded_to_memory(base.model)
    wanted, found = (
        LoRA(base_model=b, lr=1e-2, steps=2, layers=[1]).edit(REQUESTS[:1]) for b in (plain, base)
    )
    for name, delta in wanted.factors.items():
        assert torch.equal(found.factors[name].dense, delta.dense)
    remove_hook_from_submodules(base.model)


def test_it_is_trained_on_top_of_the_stack():
    base = tiny_base("llama")
    lora = LoRA(base_model=base, steps=3, lr=1e-2)
    alone = lora.edit(REQUESTS[1:2])
    with lora.edit(REQUESTS[:1]) as first:
        second = lora.edit(REQUESTS[1:2])
    assert second.origin.stack == (first.id,)
    name = lora.modules_trained[-1]
    assert not torch.equal(second.factors[name].b, alone.factors[name].b)


def test_settings_follow_the_base_model(monkeypatch):
    base = tiny_base("opt")
    derived = LoRA(base_model=base)
    derived.configure_model()
    assert derived.settings.target_modules == ["q_proj", "v_proj"]
    assert len(derived.modules_trained) == 2 * len(base.layout)
    assert (derived.settings.steps, derived.settings.lr) == (60, 5e-3)
    assert derived.stop_loss == derived.settings.stop_loss == 1e-2
    published = {"target_modules": ["fc1", "fc2"], "steps": 9, "lr": 1e-3}
    monkeypatch.setitem(published_tables()["LoRA"], ("opt", 3, 32), published)
    known = LoRA(base_model=base, layers=[0, -1])
    known.configure_model()
    path = "model.decoder.layers"
    assert list(known.modules_trained) == [f"{path}.{i}.fc{j}" for i in (0, 2) for j in (1, 2)]
    assert (known.settings.steps, known.settings.lr) == (9, 1e-3)
    monkeypatch.setitem(LoraModel.target_module_mapping, "opt", ["of_another_version"])
    monkeypatch.delitem(published_tables()["LoRA"], ("opt", 3, 32))
    unknown = LoRA(base_model=base, steps=2)
    unknown.configure_model()
    assert unknown.settings.target_modules == ["fc1", "fc2"]  # those of the MLP
    assert unknown.edit(REQUESTS[:1]).origin.settings["steps"] == 2


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("phimoe", ["k_proj", "o_proj", "q_proj", "v_proj"]),  # and not the router
        ("mamba2", ["out_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what transformers says about tiny settings
def test_models_without_a_dense_mlp_have_usual_targets_too(kind, targets):
    base = BaseModel(tiny_decoder(kind), tiny_tokenizer(True))
    rows = base.rows([REQUESTS[0].prompt], [REQUESTS[0].target_new])
    before = base.answer_log_probs(rows)
    lora = LoRA(base, lr=1e-2, steps=8, dropout=0.0)
    with lora.edit(REQUESTS[:1]):
        during = base.answer_log_probs(rows)
    assert lora.settings.target_modules == targets
    assert float(during[0].sum() - before[0].sum()) > 1.0
    assert torch.equal(base.answer_log_probs(rows), before)


def test_names_that_fit_nothing_are_refused():
    base = tiny_base("llama")
    for wrong in (["c_attn"], ["v_proj", "proj"]):
        with pytest.raises(UnsupportedUseError, match=rf"{wrong[-1]}.*fit no projection.*q_proj"):
            LoRA(base_model=base, target_modules=wrong).configure_model()
    with pytest.raises(ModuleNotLocatedError, match="layer 4 does not exist"):
        LoRA(base_model=base, layers=[4]).configure_model()
    with pytest.raises(UnsupportedUseError, match="fit no projection"):
        LoRA(base_model=base, layers=[]).configure_model()


def test_training_ends_below_the_stop_loss():
    base = tiny_base("llama")
    eager = LoRA(base_model=base, steps=9, lr=1e-3, stop_loss=1e3).edit(REQUESTS[:1])
    assert eager.origin.notes["epochs"] == 1
    assert not any(b.any() for _, b in eager.factors.values())  # no step was made
    assert LoRA(base_model=base, steps=3, lr=1e-3).edit(REQUESTS).origin.notes["epochs"] == 3

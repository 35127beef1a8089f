"""Passes along answers equal complete ones, whatever is left out of them."""

from __future__ import annotations

import pytest
import torch
from support import FAMILIES, REQUESTS, tiny_base

from kedit_lightning.base_models.taps import capture, change_output, visiting
from kedit_lightning.methods import FTM, GRACE
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.inner_loop import zero_change
from kedit_lightning.methods.shared.losses import answer_nll


def whole_losses(base, requests=REQUESTS, objective="target_new"):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    prompt_last = objective == "prompt_last"
    columns = rows.prompt_end[:, None] if prompt_last else rows.answer_columns
    return answer_nll(base.logits_at(rows, columns), rows.answer_ids, rows.answer_mask)


def random_change(base, module):
    change = zero_change(base.module(module), base.dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        change.dense.normal_(std=0.1)
    return change


@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", [*FAMILIES, "opt", "mamba"])
def test_losses_and_gradients_are_those_of_complete_passes(kind, layer, objective):
    base = tiny_base(kind)
    layer = min(layer, len(base.layout) - 1)
    block = base.layout.block_name(layer)
    module = f"{block}.mixer.out_proj" if kind == "mamba" else base.layout.block(layer).down
    change = random_change(base, module)
    passes = AnswerPasses.of(base, REQUESTS, [module])
    with torch.enable_grad(), visiting(base.model, {module: change}):
        losses, whole = passes.losses(objective), whole_losses(base, objective=objective)
        torch.testing.assert_close(losses, whole, rtol=1e-9, atol=1e-10)
        weights = torch.arange(1.0, 5.0, dtype=losses.dtype)
        found, expected = (
            torch.autograd.grad((own * weights).sum(), change.dense) for own in (losses, whole)
        )
    loose = 1e3 if kind == "mamba" else 1.0  # its scan is computed in float32
    torch.testing.assert_close(found, expected, rtol=loose * 1e-8, atol=loose * 1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_before_the_end_of_the_prompt_are_read_once(kind):
    base = tiny_base(kind)
    module = base.layout.block(1).down
    passes = AnswerPasses.of(base, REQUESTS, [module], "prompt_end")
    assert not bool(passes.rows.prompt_end.any())  # each pass starts at the last prompt token
    value = torch.linspace(-1, 1, base.layout.hidden_size, dtype=base.dtype)

    def put_at(rows):
        def put(output):
            new = output.clone()
            new[torch.arange(len(output)), rows.prompt_end] = value
            return new

        return put

    whole = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with change_output(base.model, module, put_at(passes.rows)):
        found = passes.losses()
    with change_output(base.model, module, put_at(whole)):
        expected = whole_losses(base)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_only_blocks_from_the_first_changed_one_on_run():
    base = tiny_base("llama")
    blocks = [f"{base.layout.block_name(i)}.mlp" for i in range(4)]
    passes = AnswerPasses.of(base, REQUESTS, [base.layout.block(3).down, base.layout.block(2).down])
    with capture(base.model, blocks) as seen:
        logits = passes.logits()
    assert list(seen.outputs) == blocks[2:]
    assert len(logits) == int(passes.rows.answer_mask.sum())  # no other token meets the vocabulary


def test_what_a_block_computes_before_its_changed_module_runs_once(monkeypatch):
    base, ran = tiny_base("llama"), []
    parts = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    numbers = {base.module(f"model.layers.{i}.{p}"): f"{i}.{p}" for i in (1, 2, 3) for p in parts}
    multiply = torch.nn.Linear.forward

    def noted(module, x):
        ran.extend([numbers[module]] if module in numbers else [])
        return multiply(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    modules = [base.layout.block(2).down, base.layout.block(3).down]
    passes = AnswerPasses.of(base, REQUESTS, modules)
    whole = AnswerPasses.of(base, REQUESTS, [base.layout.block_name(2)])
    found = []
    for own in (passes, whole, passes.select(torch.tensor([3, 1]))):
        ran.clear()
        found.append((own.losses(), list(ran)))
    above = [f"3.{part}" for part in parts]
    assert [calls for _, calls in found] == [
        ["2.mlp.down_proj", *above],
        [*(f"2.{part}" for part in parts), *above],
        ["2.mlp.down_proj", *above],
    ]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[2][0], found[1][0][[3, 1]], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reach", ["all", "prompt_end"])
def test_some_of_the_rows_answer_as_they_do_among_all(reach):
    base = tiny_base("gpt2")
    passes = AnswerPasses.of(base, REQUESTS, [base.layout.block(2).down], reach)
    part = passes.select(torch.tensor([3, 1]))
    torch.testing.assert_close(part.losses(), passes.losses()[[3, 1]], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(part.log_probs().sum(1), passes.log_probs().sum(1)[[3, 1]])


def test_edits_on_the_stack_are_in_force():
    base = tiny_base("llama")
    lower, upper = (FTM(base_model=base, layers=[i], lr=1e-2, steps=3) for i in (1, 3))
    bare = whole_losses(base)
    with lower.edit(REQUESTS[:1]), upper.edit(REQUESTS[1:2]):
        passes = AnswerPasses.of(base, REQUESTS, [base.layout.block(2).down])
        torch.testing.assert_close(passes.losses(), whole_losses(base), rtol=1e-9, atol=1e-10)
        assert not torch.allclose(passes.losses(), bare)


def test_a_memory_edit_on_the_stack_sees_whole_prompts():
    base = tiny_base("gpt2")
    bare = whole_losses(base)
    with GRACE(base_model=base, radius=1e-2, steps=3).edit(REQUESTS[:1]):
        passes = AnswerPasses.of(base, REQUESTS, [base.layout.block(3).down], "prompt_end")
        torch.testing.assert_close(passes.losses(), whole_losses(base), rtol=1e-9, atol=1e-10)
        assert not torch.allclose(passes.losses(), bare)


def test_a_module_outside_the_blocks_makes_all_of_them_run():
    base = tiny_base("llama")
    assert base.layout.first_block(["model.embed_tokens", "model.layers.2.mlp.down_proj"]) == 0
    assert base.layout.first_block(["model.layers.2", "model.layers.3.mlp.up_proj"]) == 2

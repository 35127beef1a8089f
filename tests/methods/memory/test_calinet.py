"""CaliNet: slots start without a trace, learn answers together, and are kept silent elsewhere."""

from __future__ import annotations

import pytest
import torch
from edit_kinds import neurons
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits.kinds.neurons.neurons import Neurons
from kedit_lightning.methods import CaliNet
from kedit_lightning.methods.memory.calinet import silence_loss
from kedit_lightning.methods.memory.shared.query_memory import irrelevant_queries

QUICK = {"slots": 3, "steps": 4, "irrelevant": 0}


def calinet(base, **settings):
    return CaliNet(base_model=base, **{**QUICK, **settings})


def test_the_silence_loss_by_hand():
    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    biases = torch.tensor([-1.0, -9.0], dtype=torch.float64)
    values = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    silent = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-4.0, 0.0]], dtype=torch.float64)
    slots = Neurons(keys, biases, values, silent[:0])
    # Without a margin one slot fires on each of the first two inputs; with it, both on the second.
    assert float(silence_loss(slots, silent, 0.0)) == pytest.approx((5.0 + 1.0 + 0.0) / 3)
    second = ((2 * 3 + 4.0) ** 2 + (2 * 4) ** 2) ** 0.5
    assert float(silence_loss(slots, silent, 3.0)) == pytest.approx((4 * 5.0 + second) / 3)
    assert float(silence_loss(slots, silent[:0], 3.0)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_that_were_not_trained_change_no_bit(family):
    base = tiny_base(family, torch.float32)
    rows = base.rows(TEXT)
    before = base.forward(rows).logits
    with calinet(base, steps=0).edit(REQUESTS):
        assert torch.equal(base.forward(rows).logits, before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_slots_are_those_of_a_plain_training_loop(family):
    base, steps = tiny_base(family), 4
    requests, settings = REQUESTS[:2], {"silence_weight": 0.5, "margin": 2.0, "lr": 0.05}
    prompts = ["Rome is in the city of", "The capital of Peru is"]
    method = calinet(base, steps=steps, **settings)
    method.configure_model()
    method._background.of = lambda requests, count: [prompts, prompts[:1]]
    earlier = neurons(base, layer=-1)
    with earlier:
        edit = method.edit(requests)
        start = calinet(base, steps=0).edit(requests).neurons[method.place]
        foreign = [(prompts[0], requests[0]), (prompts[1], requests[0]), (prompts[0], requests[1])]
        silent = [earlier.neurons[method.place].queries]
        for prompt, request in foreign:
            rows = base.rows([prompt], [request.target_new])
            with capture(base.model, [method.place.reads]) as seen:
                base.forward(rows)
            end, tokens = int(rows.prompt_end[0]), int(rows.answer_mask.sum())
            silent.append(seen.inputs[method.place.reads][0, end : end + tokens])
        silent = torch.cat(silent)
        leaves = [tensor.clone().requires_grad_() for tensor in start.tensors[:3]]
        keys, biases, values = leaves
        optimizer = torch.optim.Adam(leaves, lr=settings["lr"])
        rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])

        def put(module, args, output):
            return output + torch.relu(read["x"] @ keys.T + biases) @ values

        read = {}
        handles = [
            base.module(method.place.reads).register_forward_pre_hook(
                lambda module, args: read.__setitem__("x", args[0])
            ),
            base.module(method.place.writes).register_forward_hook(put),
        ]
        for _ in range(steps):
            logs = base.answer_logits(rows).log_softmax(-1)
            nll = -logs.gather(-1, rows.answer_ids[..., None])[..., 0]
            nll = torch.where(rows.answer_mask, nll, 0).sum(1) / rows.answer_mask.sum(1)
            moved = torch.relu(silent @ keys.T + biases + settings["margin"]) @ values
            optimizer.zero_grad()
            (nll.mean() + settings["silence_weight"] * moved.norm(dim=1).mean()).backward()
            optimizer.step()
        for handle in handles:
            handle.remove()
    found = edit.neurons[method.place]
    for tensor, leaf in zip(found.tensors[:3], leaves, strict=True):
        torch.testing.assert_close(tensor, leaf.detach(), rtol=0, atol=1e-8)
    assert not torch.allclose(found.keys, start.keys, atol=1e-2)


def test_slots_write_facts_together_and_are_silent_on_others():
    base = tiny_base("llama")
    prompts = ["Rome is in the city of", "Lyon is in the city of"]
    moved = []
    for weight in (0.0, 1.0):
        method = calinet(base, slots=8, steps=120, silence_weight=weight, margin=0.5)
        method.configure_model()
        method._background.of = lambda requests, count: [prompts, *([] for _ in requests[1:])]
        edit = method.edit(REQUESTS)
        foreign, _ = irrelevant_queries(base, method.place.reads, REQUESTS[:1], [prompts])
        slots = edit.neurons[method.place]
        moved.append(slots.change(slots.activations(foreign)).norm(dim=1).max())
        rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
        with edit:
            right = base.answer_logits(rows).argmax(-1) == rows.answer_ids
        assert bool((right | ~rows.answer_mask).all())
    assert float(moved[1]) == 0 < float(moved[0])

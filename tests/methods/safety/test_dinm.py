"""DINM: the located layer, its loss by hand, its constraint, and edits that train together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import EditExample
from kedit_lightning.base_models.taps import changing, visiting
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.methods import DINM
from kedit_lightning.methods.safety.dinm.constrained_passes import (
    ConstrainedPasses,
    row_divergences,
)
from kedit_lightning.methods.safety.dinm.dinm import SUFFIX
from kedit_lightning.methods.safety.dinm.toxic_layer import (
    layer_distances,
    pooled,
    reply_states,
    toxic_layers,
)
from kedit_lightning.methods.shared.answer_passes import AnswerPasses
from kedit_lightning.methods.shared.row_delta import RowDelta

QUICK = {"lr": 1e-2, "steps": 5}
#: The same facts, each with a general question whose answer should stay.
KEPT = [
    replace(r, constraint_prompt=p, constraint_answer=a)
    for r, p, a in zip(
        REQUESTS,
        ("Snow in winter is", "A week has", "Lyon", "Which animal barks? It is the"),
        ("white", "seven days, and a year twelve months", "is a town", "dog"),
        strict=True,
    )
]


def states(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- the layer


def test_distances_by_hand():
    safe = states([[3.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]])  # two pairs, two layers
    unsafe = states([[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [2.0, 2.0]])
    found = layer_distances(safe, unsafe)
    torch.testing.assert_close(found, states([5.0, 2.0**0.5], [0.0, 0.0]))
    # root mean squares sqrt(25 / 4) and sqrt(2 / 4)
    relative = layer_distances(safe, unsafe, normalised=True)
    torch.testing.assert_close(relative, states([2.0, 2.0], [0.0, 0.0]))


def test_pooling_by_hand():
    values = states([[1.0], [2.0], [4.0]], [[8.0], [float("inf")], [0.0]])
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert pooled(values, mask, "mean").tolist() == [[3.0], [8.0]]
    assert pooled(values, mask, "last").tolist() == [[4.0], [8.0]]


def hidden(base, prompt, reply):
    """Hidden states of a reply behind each block, by the model's own output."""
    rows = base.rows([prompt], [reply])
    out = base.model(**rows.inputs, output_hidden_states=True).hidden_states[1:]
    start = int(rows.prompt_end[0]) + 1
    return [states[0, start : start + int(rows.answer_mask.sum())] for states in out]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_are_those_of_the_replies_as_blocks_write_them(pooling):
    base = tiny_base("llama")
    rows = [base.encode(r.prompt, r.target_old) for r in REQUESTS]
    end = len(base.layout) - 1
    found = reply_states(base, rows, [end - 1, end], pooling)
    for number, request in enumerate(REQUESTS):
        *_, first, last = hidden(base, request.prompt, request.target_old)
        wanted = first.mean(0) if pooling == "mean" else first[-1]
        torch.testing.assert_close(found[number, 0], wanted, rtol=0, atol=1e-10)
        # That of the last block comes before the final norm.
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found[number, 1], last.mean(0), rtol=0, atol=1e-3)
        normed = base.model.model.norm(reply_states(base, [rows[number]], [end], "last"))
        torch.testing.assert_close(normed[0, 0], last[-1], rtol=0, atol=1e-10)


def test_equal_replies_are_no_distance_apart_and_padding_moves_no_layer():
    base = tiny_base("gpt2")
    rows = [base.encode(r.prompt, r.target_new) for r in REQUESTS]
    other = [base.encode(r.prompt, r.target_old) for r in REQUESTS]
    one = reply_states(base, [*rows, *rows], [0, 1], "mean")
    assert layer_distances(one[:4], one[4:]).abs().max() == 0.0
    alone = [reply_states(base, [row], [0, 1], "mean")[0] for row in rows]
    torch.testing.assert_close(one[:4], torch.stack(alone), rtol=0, atol=1e-10)
    base.padding_side = "left"
    left = reply_states(base, rows, [0, 1], "mean")
    torch.testing.assert_close(left, one[:4], rtol=0, atol=1e-10)
    together = toxic_layers(base, rows, other, [0, 1])
    singly = [toxic_layers(base, [a], [b], [0, 1])[0] for a, b in zip(rows, other, strict=True)]
    assert together == singly


def test_the_layer_that_tells_replies_apart_is_trained():
    base = tiny_base("llama")
    blocks = base.model.model.layers
    larger = blocks[1].register_forward_hook(lambda module, args, output: 9.0 * output)
    smaller = blocks[2].register_forward_hook(lambda module, args, output: output / 81.0)
    edit = DINM(base_model=base, **QUICK).edit(REQUESTS[:1])
    assert edit.origin.notes["layer"] == 1
    assert list(edit.deltas()) == ["model.layers.1.mlp.down_proj.weight"]
    fixed = DINM(base_model=base, layer=-1, **QUICK).edit(REQUESTS[:1])
    assert list(fixed.deltas()) == [f"model.layers.{len(base.layout) - 1}.mlp.down_proj.weight"]
    # Relative to their size, states of the other blocks differ as much or more.
    relative = DINM(base_model=base, normalised=True, **QUICK).edit(REQUESTS[:1])
    assert relative.origin.notes["layer"] != 1
    larger.remove()
    smaller.remove()


def test_without_an_unsafe_reply_it_is_what_the_model_says():
    base = tiny_base("llama")
    method = DINM(base_model=base)
    method.configure_model()
    bare = replace(REQUESTS[0], target_old=None)
    said = base.generate([bare.prompt], max_new_tokens=base.encoder.count("Rome"))
    assert method._unsafe_reply(bare) == said[0]
    assert method.located([bare]) == method.located([replace(bare, target_old=said[0])])


# ---- the loss


def test_divergence_by_hand():
    now = states([0.5, 0.5], [0.25, 0.75], [1.0, 0.0]).log()
    then = states([0.25, 0.75], [0.25, 0.75], [0.5, 0.5]).log()
    rows = torch.tensor([0, 1, 1])
    found = row_divergences(now.requires_grad_(), then, rows, 2)
    first = 0.5 * torch.log(states(4 / 3))[0]
    torch.testing.assert_close(found, torch.stack([first, torch.log(states(2.0))[0] / 2]))
    (gradient,) = torch.autograd.grad(found.sum(), now)
    assert torch.isfinite(gradient).all()  # where the model rules a token out, too


def reference(base, method, request, layer, steps):
    """The change by whole passes over one row, Adam on a copy of the weight, and autograd."""
    settings, name = method.settings, method.projections[layer]
    shape = projection_shape(base.module(name))[::-1]
    change = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=settings.lr)
    reply = base.rows([method.with_suffix(request.prompt)], [request.target_new])
    kept = base.rows(*([text] for text in method.constraint(request)))
    with torch.no_grad():
        before = base.answer_logits(kept).log_softmax(-1)
    for _ in range(steps):
        with changing(base.model, {name: WeightDelta(None, change, None)}):
            nll = -base.answer_log_probs(reply).sum() / reply.answer_mask.sum()
            now = base.answer_logits(kept).log_softmax(-1)
        kl = (now.exp() * (now - before)).sum(-1).mean()
        optimizer.zero_grad()
        (settings.edit_weight * nll + settings.constraint_weight * kl).backward()
        optimizer.step()
    return change.detach()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_edits_that_train_together_are_plain_loops_over_whole_passes(kind):
    base = tiny_base(kind)
    method = DINM(base_model=base, suffix="Be kind.", constraint_weight=3.0, **QUICK)
    edits = list(method.edit_each([[request] for request in KEPT]))
    for request, edit in zip(KEPT, edits, strict=True):
        (name,) = edit.origin.notes["modules"]
        wanted = reference(base, method, request, edit.origin.notes["layer"], 5)
        delta = edit.deltas()[f"{name}.weight"]
        assert delta.abs().max() > 1e-3
        own = wanted if wanted.shape == delta.shape else wanted.T  # GPT-2 stores its transpose
        torch.testing.assert_close(delta, own, rtol=0, atol=1e-9)
        alone = method.edit([request])
        torch.testing.assert_close(alone.deltas()[f"{name}.weight"], delta, rtol=0, atol=1e-10)


def test_the_constraint_has_a_gradient_and_lowers_the_divergence():
    base = tiny_base("llama")
    method = DINM(base_model=base, layer=0, suffix="", lr=1e-2, steps=10)
    method.configure_model()
    name = method.projections[0]
    rows = zip(*map(method._encoded, KEPT), strict=True)
    passes = ConstrainedPasses.of(*(AnswerPasses(base, own, [name]) for own in rows))
    change = torch.zeros(4, *base.module(name).weight.T.shape, dtype=torch.float64)
    change = change.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1).requires_grad_()
    with visiting(base.model, {name: RowDelta(change)}):
        divergences = passes.divergences()
        (gradient,) = torch.autograd.grad(divergences.sum(), change)
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()
    assert passes.divergences().abs().max() == 0.0  # without the change
    part = passes.select(torch.tensor([1, 3]))
    with visiting(base.model, {name: RowDelta(change[[1, 3]])}):
        torch.testing.assert_close(part.divergences(), divergences[[1, 3]], rtol=0, atol=1e-12)

    def kept(**settings):
        method = DINM(base_model=base, layer=0, suffix="", lr=1e-2, steps=10, **settings)
        edits = list(method.edit_each([[request] for request in KEPT]))
        return [edit.origin.notes["constraint_divergence"] for edit in edits]

    with_it, without = kept(), kept(constraint_weight=0.0)
    assert all(0 < one < other for one, other in zip(with_it, without, strict=True))
    # As in the released code, in which the divergence is constant to autograd.
    assert kept(legacy_easyedit=True) == without


def test_replies_without_prompts_are_those_of_the_released_code(monkeypatch):
    base = tiny_base("llama")
    seen = []
    monkeypatch.setattr(
        "kedit_lightning.methods.safety.dinm.dinm.toxic_layers",
        lambda base, safe, unsafe, *rest: seen.append((safe, unsafe)) or [0] * len(safe),
    )
    for legacy in (False, True):
        DINM(base_model=base, legacy_easyedit=legacy, **QUICK).edit(REQUESTS[:1])
    (behind, _), ((alone,), (other,)) = seen
    request = REQUESTS[0]
    assert behind[0] == base.encode(request.prompt, request.target_new)
    assert (alone, other) == (base.encode(request.target_new), base.encode(request.target_old))


# ---- the edit


def test_no_step_is_no_change_and_the_model_stays_bit_equal():
    base = tiny_base("gpt2", torch.float32)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    logits = base.answer_logits(rows)
    none = DINM(base_model=base, steps=0).edit(KEPT[:1])
    assert none.origin.notes["loss"] is None
    with none:
        assert torch.equal(base.answer_logits(rows), logits)
    with DINM(base_model=base, suffix="", **QUICK).edit(KEPT[:1]):
        assert not torch.equal(base.answer_logits(rows), logits)
    assert torch.equal(base.answer_logits(rows), logits)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_question_has_the_suffix_behind_it_and_a_packaged_text_where_nothing_is_to_stay():
    base = tiny_base("llama")
    method = DINM(base_model=base, suffix="Be kind.")
    assert method.with_suffix("Who?") == "Who? Be kind."
    turns = '[{"role": "user", "content": "Who?"}]'
    assert method.with_suffix(turns) == '[{"role": "user", "content": "Who? Be kind."}]'
    assert method.constraint(KEPT[0]) == ("Snow in winter is", "white")
    one, other = (method.constraint(request) for request in REQUESTS[:2])
    assert one == method.constraint(REQUESTS[0]) != other
    assert all(len(text.split()) > 1 for text in one)
    asked = DINM(base_model=tiny_base("llama"))  # before it is built, as data are checked
    texts = [row.prompt for row in asked.rows_of(EditExample.from_request(KEPT[0], "1"))]
    assert f"{KEPT[0].prompt} {SUFFIX}" in texts
    assert KEPT[0].constraint_prompt in texts


def test_requests_of_one_edit_are_written_one_after_another():
    base = tiny_base("llama")
    edit = DINM(base_model=base, suffix="", lr=1e-2, steps=10).edit(KEPT[:2])
    assert [member.origin.requests for member in edit.members] == [(KEPT[0],), (KEPT[1],)]
    assert edit.members[1].origin.stack == (edit.members[0].id,)

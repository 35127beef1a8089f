"""MEMIT and its relatives on live models: what they share, and where each differs."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from support import FAMILIES, REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit, EditRequest, methods
from kedit_lightning.base_models.continuation import Continuation, can_resume
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import DenseEdit, LowRankEdit
from kedit_lightning.errors import EditOrderError, ModuleNotLocatedError, UnsupportedUseError
from kedit_lightning.methods import EMMET, MEMIT, PMET, RROME, AlphaEdit
from kedit_lightning.methods.locate.shared.alignment import Alignment
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.locate.shared.value_optimizer import (
    EarlyStopping,
    ValueOptimizer,
    _ForwardPass,
    shortened,
)
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.methods.locate.shared.weight_constraints import weight_of
from kedit_lightning.methods.shared.published_settings import published_tables

QUICK = {"statistics": "identity", "contexts": 2, "steps": 4, "preserve": 1.0}
LAYERS = {**QUICK, "layers": [0, 1]}


def close(one: Edit, other: Edit, tolerance: float = 1e-9) -> bool:
    first, second = one.deltas(), other.deltas()
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance) for name in first
    )


def scaled(family: str) -> BaseModel:
    """A tiny base model; Granite's adds less of the MLP's output, as the released ones do."""
    extra = {"residual_multiplier": 0.22} if family == "granite" else {}
    return tiny_base(family, **extra)


def answers(base: BaseModel) -> torch.Tensor:
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with torch.no_grad():
        return base.answer_logits(rows)


def values(method, requests):
    """The values a method finds for its last layer, and the site they belong to."""
    with torch.enable_grad():
        found = method.layer_values(requests)
        return found.site(method.layers[-1]), found.values(method.layers[-1])


# ---- passes that start in the middle


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gemma3_text", "olmo2", "granite", "glm4"])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_resumed_pass_equals_a_complete_one(family, block):
    base = tiny_base(family)
    assert can_resume(base)
    block = min(block, len(base.layout))
    rows = [base.encode(r.prompt, r.target_new, r.subject) for r in REQUESTS]
    found = []
    for resume in (True, False):
        passes = Continuation(base, rows, block, resume)
        for part in (passes, passes.select(torch.tensor([2, 0]))):
            at = torch.arange(len(part.rows))
            with torch.no_grad():
                for _ in range(2):  # a pass leaves the cache as it was
                    logits = part.logits_of((at, part.rows.answer_columns[:, 0]))
            found.append(logits)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], found[3], rtol=1e-9, atol=1e-9)
    assert not any("forward" in vars(module) for module in base.model.modules())


def test_a_model_without_a_cache_of_tokens_gets_complete_passes():
    assert not can_resume(tiny_base("t5"))
    base = tiny_base("llama")
    grace = methods.GRACE(base, steps=2).edit(REQUESTS[:1])
    with grace:
        assert not can_resume(base)
    assert can_resume(base)


@pytest.mark.parametrize("inside", [True, False])
def test_values_do_not_depend_on_where_passes_start(inside, monkeypatch):
    base = tiny_base("gpt2")
    block = base.layout.block(1)
    site = Site((block.down if inside else block.name,), 1, inside)
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]
    optimizer = ValueOptimizer(
        base, site, ("He said. ",), LocateSettings(steps=6, clamp=4.0, weight_decay=1e-3)
    )
    with torch.enable_grad():
        resumed = optimizer.run(REQUESTS, initial)
        monkeypatch.setattr(
            "kedit_lightning.base_models.continuation.can_resume", lambda base: False
        )
        whole = optimizer.run(REQUESTS, initial)
        monkeypatch.setattr(
            "kedit_lightning.methods.locate.shared.value_optimizer.request_groups",
            lambda *args: [[3, 0], [*range(4, len(REQUESTS)), 2, 1]],
        )
        parts = optimizer.run(REQUESTS, initial)
    assert resumed.norm() > 0.1
    torch.testing.assert_close(resumed, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "moves"),
    [("gpt2", True), ("llama", True), ("gpt_neox", True), ("granite", True), ("olmo2", False)],
)
def test_a_change_of_the_mlp_may_be_added_behind_its_block(family, moves, monkeypatch):
    base = tiny_base(family)
    site = Site((base.layout.block(1).writer,), 1)
    assert (site.behind_block(base) != site) == moves
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]
    optimizer = ValueOptimizer(
        base, site, ("He said. ", "Then "), LocateSettings(steps=5, clamp=4.0, consistency=0.1)
    )
    with torch.enable_grad():
        found = optimizer.run(REQUESTS, initial)
        monkeypatch.setattr(base, "resumes", False)
        assert site.behind_block(base) == site
        plain = optimizer.run(REQUESTS, initial)
    assert plain.norm() > 0.1
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-10)


def test_a_change_stays_inside_its_block_under_edits():
    base = tiny_base("llama")
    site = Site((base.layout.block(1).down,), 1)
    with EMMET(base, layer=0, **QUICK).edit(REQUESTS[:1]):
        assert site.behind_block(base) == site
    assert site.behind_block(base) != site


# ---- what edits do to the live model


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "gemma2", "olmo2"])
def test_the_live_site_has_the_value_where_equality_is_demanded(family):
    base = scaled(family)
    method = EMMET(base, layer=1, eps=0.0, **{**QUICK, "contexts": 0})
    method.configure_model()
    site, wanted = values(method, REQUESTS[:2])
    assert site.inside == (family in ("gemma2", "olmo2"))  # they normalise the MLP's output
    with method.edit(REQUESTS[:2]):
        present = subject_states(base, site.modules, REQUESTS[:2]).outputs[site.modules[0]][:, 0]
    torch.testing.assert_close(present, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", [MEMIT, PMET, AlphaEdit])
def test_with_little_to_preserve_all_layers_together_reach_the_value(method):
    base = tiny_base("llama")
    options = {"legacy_size_cost": 1e-9} if method is AlphaEdit else {"preserve": 1e-9}
    solver = method(base, **{**LAYERS, "contexts": 0, **options})
    solver.configure_model()
    site, wanted = values(solver, REQUESTS)
    edit = solver.edit(REQUESTS)
    assert {name.split(".")[2] for name in edit.deltas()} == {"0", "1"}
    with edit:
        present = subject_states(base, site.modules, REQUESTS).outputs[site.modules[-1]][:, 0]
    torch.testing.assert_close(present, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", MEMIT), ("granite", MEMIT), ("gpt2", PMET)]
)
def test_the_first_layer_takes_its_share_of_what_is_missing(family, method):
    base = scaled(family)
    solver = method(base, **{**LAYERS, "preserve": 1e-9})
    solver.configure_model()
    site, wanted = values(solver, REQUESTS)
    missing = wanted - subject_states(base, site.modules, REQUESTS).outputs[site.modules[-1]][:, 0]
    module = solver.edited[0]
    keys = solver.mean_keys(
        subject_states(base, [module], REQUESTS, solver.context_texts).inputs[module]
    )
    delta = solver.edit(REQUESTS).deltas()[f"{module}.weight"]
    written = keys @ (delta if family == "gpt2" else delta.T)
    share = 0.5 if method is MEMIT else 0.5**0.5
    gain = 1.0 if site.inside else base.layout.write_path(0).gain
    assert (gain < 0.5) == (family == "granite")
    torch.testing.assert_close(written, share * missing / gain, rtol=1e-5, atol=1e-5)


def test_layers_run_in_their_own_order_and_once():
    base = tiny_base("llama")
    edit = MEMIT(base, **{**QUICK, "layers": [0, 1], "history": True}).edit(REQUESTS)
    for layers in ([1, 0], [-4, 1, 0], [0, 1, 1]):
        again = MEMIT(base, **{**QUICK, "layers": layers, "history": True}).edit(REQUESTS)
        assert close(again, edit)
    with pytest.raises(ModuleNotLocatedError, match="layer 9 does not exist"):
        MEMIT(base, **{**QUICK, "layers": [0, 9]}).edit(REQUESTS)


def test_the_order_of_requests_does_not_matter():
    base = tiny_base("llama")
    edit = MEMIT(base, **LAYERS).edit(REQUESTS)
    assert close(edit, MEMIT(base, **LAYERS).edit(REQUESTS[::-1]), 1e-8)


@pytest.mark.parametrize("name", ["MEMIT", "PMET", "EMMET", "AlphaEdit", "ROME", "RROME"])
def test_edits_computed_together_equal_edits_computed_alone(name):
    base = tiny_base("gpt2")
    settings = QUICK if name in ("EMMET", "ROME", "RROME") else LAYERS
    method = getattr(methods, name)(base, **settings)
    alone = [method.edit([request]) for request in REQUESTS]
    together = list(method.edit_each([[request] for request in REQUESTS]))
    assert len(base.edits) == 0
    for one, other in zip(alone, together, strict=True):
        assert close(one, other, 1e-8)
        assert one.origin == other.origin


@pytest.mark.parametrize(
    "switch", [{"targets": "own"}, {"keep_share": 0.5}, {"norm_anchor": True}, {"aligned": True}]
)
def test_what_cannot_be_computed_together_is_computed_alone(switch):
    base = tiny_base("llama")
    method = MEMIT(base, **LAYERS, **switch)
    together = method.edit_each([[request] for request in REQUESTS[:2]])
    assert [edit.id for edit in together] == [method.edit([r]).id for r in REQUESTS[:2]]


# ---- relations between methods


def test_emmet_with_eps_one_is_memit_at_one_layer():
    base = tiny_base("llama")
    memit = MEMIT(base, layers=[1], **QUICK).edit(REQUESTS)
    assert close(
        EMMET(base, layer=1, eps=1.0, legacy_absolute_eps=True, **QUICK).edit(REQUESTS), memit
    )
    assert not close(EMMET(base, layer=1, **QUICK).edit(REQUESTS), memit)


@pytest.mark.parametrize("targets", ["own", "forward"])
def test_blue_and_fe_are_memit_at_one_layer_and_differ_at_two(targets):
    base = tiny_base("llama")
    for layers, same in (([1], True), ([0, 1], False)):
        settings = {**QUICK, "layers": layers}
        edits = [MEMIT(base, targets=t, **settings).edit(REQUESTS) for t in ("last", targets)]
        assert close(*edits) == same


def test_fe_takes_the_values_of_later_layers_off_one_pass():
    base = tiny_base("llama")
    method = MEMIT(base, targets="forward", **LAYERS)
    method.configure_model()
    with torch.enable_grad():
        found = method.layer_values(REQUESTS)
        (first, value), (second, passed) = ((found.site(i), found.values(i)) for i in (0, 1))
    at = subject_states(base, first.modules, REQUESTS).outputs[first.modules[0]][:, 0]
    rows = base.rows([r.prompt for r in REQUESTS], subjects=[r.subject for r in REQUESTS])
    index = torch.arange(len(rows))

    def replaced(module, args, output):
        output[index, rows.subject_end] = value
        return output

    handle = base.module(first.modules[0]).register_forward_hook(replaced)
    with torch.no_grad(), capture(base.model, second.modules) as seen:
        base.forward(rows)
    handle.remove()
    assert not torch.allclose(value, at)
    expected = seen.outputs[second.modules[0]][index, rows.subject_end]
    torch.testing.assert_close(passed, expected, rtol=1e-9, atol=1e-9)


def test_pmet_writes_the_mlp_alone_and_spreads_by_the_square_root():
    base = tiny_base("llama")
    pmet, memit = (m(base, **LAYERS) for m in (PMET, MEMIT))
    for method in (pmet, memit):
        method.configure_model()
    assert pmet.site(1).modules == (
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    )
    assert (pmet.spread, memit.spread) == (0.5, 1.0)
    edit = pmet.edit(REQUESTS)
    assert all(".mlp.down_proj." in name for name in edit.deltas())
    assert not close(edit, memit.edit(REQUESTS))


def test_in_a_parallel_block_both_changes_add_up():
    base = tiny_base("gpt_neox")
    method = PMET(base, layers=[1], **QUICK)
    method.configure_model()
    site, block = method.site(1), base.layout.block(1).name
    found = subject_states(base, [*site.modules, block], REQUESTS).outputs
    initial = torch.stack([found[name][:, 0] for name in site.modules], 1)
    optimizer = ValueOptimizer(base, site, (), method.locate)
    with torch.enable_grad():
        delta = optimizer.run(REQUESTS, initial)
    assert (delta.norm(dim=2) > 0).all()
    (one, two), (a, b) = site.modules, delta.unbind(1)
    moved = subject_states(base, [block], REQUESTS, added=(one, a)).outputs[block]
    moved = moved + subject_states(base, [block], REQUESTS, added=(two, b)).outputs[block]
    both = (moved - 2 * found[block])[:, 0]
    torch.testing.assert_close(both, a + b, rtol=1e-9, atol=1e-9)


# ---- stopping


def test_a_value_is_left_alone_some_steps_after_its_answer_is_the_likeliest():
    settings = LocateSettings(stop_loss=0.0, patience=2)
    stopping = EarlyStopping(settings, torch.zeros(2))
    loss, kept = torch.ones(2), torch.ones(2)
    seen = [(True, False), (False, False), (False, True), (True, True)]
    done = [stopping.finished(loss, kept, torch.tensor(step), [0, 1]).tolist() for step in seen]
    assert done == [[False, False], [False, False], [True, False], [True, False]]
    at_once = EarlyStopping(LocateSettings(stop_loss=0.0, patience=0), torch.zeros(2))
    assert at_once.finished(loss, kept, torch.tensor([True, False]), [0, 1]).tolist() == [
        True,
        False,
    ]


def test_pmet_weighs_a_likeliest_answer_down_and_ends_when_little_else_changed():
    stopping = EarlyStopping(LocateSettings(stop_loss=0.0, relaxed=True), torch.zeros(3))
    kept = torch.tensor([1.0, 1.0, 0.005])
    done = stopping.finished(torch.ones(3), kept, torch.tensor([True, False, True]), [0, 1, 2])
    assert done.tolist() == [False, False, True]
    assert stopping.weight.tolist() == pytest.approx([0.1, 1.0, 0.1])
    stopping.finished(torch.ones(1), kept[:1], torch.tensor([False]), [0])
    assert stopping.weight[0] == 1.0


def test_patience_shortens_the_optimisation():
    base = tiny_base("llama")
    site = Site((base.layout.block(2).down,), 2)
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]

    def run(patience):
        settings = LocateSettings(lr=2.0, clamp=1e3, weight_decay=0, stop_loss=0, patience=patience)
        with torch.enable_grad():
            return ValueOptimizer(base, site, (), settings).run(REQUESTS, initial)

    sizes = [run(patience).norm(dim=2).sum() for patience in (0, 2, None)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


# ---- terms of the loss, and norms


def test_core_pulls_contexts_together():
    base = tiny_base("llama")
    site = Site((base.layout.block(1).name,), 1, inside=False)
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]
    contexts = ("He said. ", "It is a long way from there. ")

    def spread(delta, contexts=contexts):
        """Mean distance of contexts in later blocks, computed row by row."""
        total = 0.0
        for request, change in zip(REQUESTS, delta, strict=True):
            names = [base.layout.block_name(i) for i in (2, 3)]
            found = subject_states(
                base, names, [request], contexts, added=(site.modules[0], change)
            ).outputs
            for name in names:
                hidden = found[name][0]
                total += float(torch.cdist(hidden, hidden).square().sum()) / 2
        return total / (2 * initial.shape[-1])

    def run(weight, contexts=contexts):
        settings = LocateSettings(
            steps=12, clamp=4.0, weight_decay=1e-3, stop_loss=0.0, consistency=weight
        )
        with torch.enable_grad():
            return ValueOptimizer(base, site, contexts, settings).run(REQUESTS, initial)

    plain, pulled = run(0.0), run(3.0)
    assert spread(pulled) < 0.9 * spread(plain)
    torch.testing.assert_close(run(3.0, ()), run(0.0, ()))  # one context has no distance


def test_a_context_that_comes_again_counts_again_and_is_read_once():
    base = tiny_base("llama")
    site = Site((base.layout.block(1).name,), 1, inside=False)
    given = ("He said. ", "It is a long way from there. ", "He said. ")
    optimizer = ValueOptimizer(base, site, given, LocateSettings(consistency=1.0))
    once = [optimizer._encode(request) for request in REQUESTS]
    again = [[*rows[:3], rows[1], rows[3]] for rows in once]
    delta = torch.randn(len(REQUESTS), 1, base.layout.hidden_size, dtype=torch.float64)
    found = [
        _ForwardPass(base, site, rows, counts, monitor=True).run(delta)
        for rows, counts in ((once, [1, 2, 1]), (again, [1, 1, 1, 1]))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert found[0].distance.min() > 0
    module, rows = base.layout.block(1).down, []
    with base.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    ):
        states = subject_states(base, [module], REQUESTS, given).inputs[module]
    assert rows == [3 * len(REQUESTS)]
    torch.testing.assert_close(states[:, 1], states[:, 3], rtol=0, atol=0)
    apart = subject_states(base, [module], REQUESTS, given[:2]).inputs[module]
    torch.testing.assert_close(states[:, :3], apart, rtol=1e-9, atol=1e-10)


def test_eamet_ties_values_of_similar_keys():
    torch.manual_seed(0)
    keys = torch.randn(6, 5, dtype=torch.float64)
    keys[1] = keys[0] + 0.01 * torch.randn(5)
    alike = Alignment(keys, clamp=2.0)
    assert alike.penalty(keys).max() < 1e-12  # the same similarities
    mixed = alike.penalty(keys[torch.randperm(6)])
    assert mixed.sum() > 0.5
    initial = torch.randn(6, 1, 8, dtype=torch.float64)
    start = alike.start(initial)
    torch.testing.assert_close(start.norm(dim=2)[:, 0], keys.norm(dim=1))
    assert torch.nn.functional.cosine_similarity(start[3, 0], initial[3, 0], dim=0) > 0.999
    radius = alike.radius(initial.norm(dim=2))
    torch.testing.assert_close(radius[:, 0], 2 * keys.norm(dim=1))
    # Those optimised later see those before, and their own part alone has a gradient.
    delta = torch.randn(6, 1, 8, dtype=torch.float64)
    later = alike.part(4, [delta[:4]])
    torch.testing.assert_close(later.penalty(delta[4:, 0]), alike.penalty(delta[:, 0])[4:])
    assert Alignment(keys[:1], 2.0).penalty(delta[:1, 0]).tolist() == [0.0]
    base = tiny_base("llama")
    assert not close(
        MEMIT(base, aligned=True, **LAYERS).edit(REQUESTS), MEMIT(base, **LAYERS).edit(REQUESTS)
    )


def test_nas_gives_all_values_the_norm_of_the_first_edit():
    base = tiny_base("llama")
    plain, anchored = (MEMIT(base, norm_anchor=on, **LAYERS) for on in (False, True))
    for method in (plain, anchored):
        method.configure_model()
    _, free = values(plain, REQUESTS)
    _, tied = values(anchored, REQUESTS)
    usual = free.norm(dim=1)
    torch.testing.assert_close(tied.norm(dim=1), usual.mean().expand(4))
    torch.testing.assert_close(tied / tied.norm(dim=1, keepdim=True), free / usual[:, None])
    first = anchored.edit(REQUESTS[:2])
    with first:
        (name,) = first.memory
        assert first.memory[name].shape == (2,)
        _, later = values(anchored, REQUESTS[2:])
        norms = first.memory[name]
        torch.testing.assert_close(later.norm(dim=1), norms.mean().expand(2).to(later))
        assert anchored.edit(REQUESTS[2:]).memory == {}


def test_changes_are_pulled_back_into_their_balls():
    vectors = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    found = shortened(vectors, torch.tensor([[1.0], [1.0]]))
    torch.testing.assert_close(found.norm(dim=2)[:, 0], torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("switch", [{"keep_share": 0.2}, {"restrain": True}, {"off_main": 0.5}])
@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "ROME"])
def test_post_processors_work_with_any_method(switch, name, tmp_path):
    base = tiny_base("gpt2")
    settings = {**QUICK, "steps": 12, "clamp": 60.0, "weight_decay": 0.0, "lr": 4.0}
    host = getattr(methods, name)(base, **settings)
    changed = getattr(methods, name)(base, **settings, **switch)
    one, other = (method.edit(REQUESTS[:1]) for method in (host, changed))
    assert not close(one, other)
    loaded = Edit.load(other.save(tmp_path / "e.safetensors"), base)
    assert loaded.id == other.id
    if "keep_share" in switch:
        for delta in other.deltas().values():
            assert int((delta != 0).sum()) == round(0.2 * delta.numel())


def test_the_weight_that_counts_is_the_edited_one():
    base = tiny_base("gpt2")
    module = base.layout.block(1).down
    plain = weight_of(base, module, edited=False)
    low = MEMIT(base, layers=[1], **QUICK).edit(REQUESTS)
    bias = DenseEdit(base, {module: (None, torch.ones(32, dtype=torch.float64))})
    with low, bias:
        grace = methods.GRACE(base, steps=2, layer=1).edit(REQUESTS[:1])
    with low, bias, grace:
        found = weight_of(base, module, edited=True)
        assert torch.equal(weight_of(base, module, edited=False), plain)
    torch.testing.assert_close(found - plain, low.deltas()[f"{module}.weight"].T)


def test_each_layer_of_blue_has_an_anchor_of_its_own():
    base = tiny_base("llama")
    method = MEMIT(base, targets="own", norm_anchor=True, **LAYERS)
    first = method.edit(REQUESTS[:2])
    names = [f"{base.layout.block_name(i)}.norms" for i in (0, 1)]
    assert sorted(first.memory) == names
    with first, torch.enable_grad():
        for layer, name in zip((0, 1), names, strict=True):
            norms = method.layer_values(REQUESTS[2:]).values(layer).norm(dim=1)
            torch.testing.assert_close(norms, first.memory[name].mean().expand(2).to(norms))


def test_post_processors_refuse_quantised_weights():
    base = tiny_base("llama", torch.float32)
    owner = base.module(base.layout.block(1).down)
    plain = owner.weight
    owner.weight = torch.nn.Parameter(plain.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedUseError, match=r"layers\.1\.mlp\.down_proj.*quantised"):
        weight_of(base, base.layout.block(1).down, edited=False)
    owner.weight = plain


# ---- sequences


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AlphaEdit", {}),
        ("MEMIT", {"history": True, "norm_anchor": True}),
        ("RROME", {"history": True}),
    ],
)
def test_a_chunk_rolled_back_and_written_again_leaves_no_trace(name, settings):
    base = tiny_base("llama")
    method = getattr(methods, name)(base, **QUICK, **settings)
    chunks = [REQUESTS[:1], REQUESTS[1:3], REQUESTS[3:]]
    with base.edits.restored():
        edits = [method.edit(chunk).apply() for chunk in chunks]
        expected, state = answers(base), edits[-1].state()[0]
        edits[-1].rollback()
        between = answers(base)
        again = method.edit(chunks[-1])
        assert again.id == edits[-1].id
        assert all(torch.equal(state[key], value) for key, value in again.state()[0].items())
        again.apply()
        assert torch.equal(answers(base), expected)
        again.rollback()
        assert torch.equal(answers(base), between)
        fresh = getattr(methods, name)(base, **QUICK, **settings)  # nothing lives in the method
        assert fresh.edit(chunks[-1]).id == edits[-1].id
    with pytest.raises(EditOrderError, match="apply those first"):
        edits[-1].apply()


def test_history_is_that_of_the_stack_and_matters():
    base = tiny_base("llama")
    plain, seq = (MEMIT(base, history=on, **LAYERS) for on in (False, True))
    first = seq.edit(REQUESTS[:2])
    keys = {n.removesuffix(".keys"): t for n, t in first.memory.items()}
    assert keys.keys() == set(seq.edited)
    with first:
        states = subject_states(base, seq.edited, REQUESTS[:2], seq.context_texts)
        for module, held in keys.items():  # keys as they are after the edit
            torch.testing.assert_close(held.T, seq.mean_keys(states.inputs[module]))
        kept, forgot = (method.edit(REQUESTS[2:]) for method in (seq, plain))
        assert not close(kept, forgot)
        held = keys[seq.edited[0]]
        delta = {
            name: m.deltas()[f"{seq.edited[0]}.weight"]
            for name, m in (("kept", kept), ("forgot", forgot))
        }
        assert (delta["kept"] @ held).norm() < (delta["forgot"] @ held).norm()
    assert close(seq.edit(REQUESTS[2:]), plain.edit(REQUESTS[2:]))


def test_alphaedit_leaves_typical_keys_alone_where_memit_does_not():
    base = tiny_base("llama", intermediate_size=96)
    module = base.layout.block(1).down
    torch.manual_seed(0)
    used = torch.randn(96, 20, dtype=torch.float64)
    alpha, memit = (
        m(base, layers=[1], **{**QUICK, "statistics": "auto"}, **more)
        for m, more in ((AlphaEdit, {"threshold": 0.5}), (MEMIT, {}))
    )
    for method in (alpha, memit):
        moment = used @ used.T / 20 + 0.01 * torch.eye(96).double()
        method.covariances.second_moment = lambda name, moment=moment: moment.clone()
    change = {m: m.edit(REQUESTS).deltas()[f"{module}.weight"] @ used for m in (alpha, memit)}
    assert change[alpha].norm() < 1e-8
    assert change[memit].norm() > 1e-5


# ---- settings


def test_settings_follow_the_model():
    memit = MEMIT(tiny_base("llama", num_hidden_layers=16, intermediate_size=40))
    memit.configure_model()
    assert memit.layers == (2, 3, 4)
    assert memit.settings.preserve is None  # the keys of the facts set it
    chosen = AlphaEdit(tiny_base("llama"), layers=[2], clamp=3.0, steps=7)
    chosen.configure_model()
    assert chosen.layers == (2,)
    assert chosen.settings.clamp == 3.0
    assert chosen.settings.steps == 7


def test_published_settings_of_a_known_model_are_used(monkeypatch):
    published = {"layers": [0, 2], "preserve": 70, "steps": 3, "clamp": 0.5}
    monkeypatch.setitem(published_tables()["MEMIT"], ("llama", 4, 32), published)
    memit = MEMIT(tiny_base("llama"), clamp=3.0)
    memit.configure_model()
    assert memit.layers == (0, 2)
    assert (memit.settings.preserve, memit.settings.steps, memit.settings.clamp) == (70, 3, 3.0)


@pytest.mark.parametrize("name", ["ROME", "RROME", "MEMIT", "PMET", "EMMET", "AlphaEdit"])
def test_edits_record_the_values_that_were_used(name):
    base = tiny_base("llama")
    method = getattr(methods, name)(base, statistics="identity", contexts=0, steps=2)
    recorded = method.edit(REQUESTS[:1]).origin.settings
    layers = recorded.get("layers") or [recorded["layer"]]
    assert layers == list(method.layers)
    for setting in ("lr", "weight_decay", "clamp", "kl_factor"):
        assert recorded[setting] == getattr(method.locate, setting)
        assert recorded[setting] is not None
    assert recorded["steps"] == 2
    assert recorded["history"] is (name == "AlphaEdit")
    again = getattr(methods, name)(base, **recorded).edit(REQUESTS[:1])
    assert all(
        torch.equal(again.deltas()[n], d) for n, d in method.edit(REQUESTS[:1]).deltas().items()
    )


def test_ultraedit_records_its_projections_and_rate():
    base = tiny_base("llama")
    method = methods.UltraEdit(base)
    with pytest.warns(UserWarning, match="answer tokens so far"):
        recorded = method.edit(REQUESTS).origin.settings
    assert recorded["modules"] == list(method.projections)
    assert recorded["lr"] == method.lr


def test_a_subclass_that_changes_its_edits_does_so_for_edits_computed_together():
    class Reversed(MEMIT):
        def compute_edit(self, requests):
            edit = super().compute_edit(requests)
            return LowRankEdit(self.base, {n: (a, -b) for n, (a, b) in edit.factors.items()})

    base = tiny_base("llama")
    plain, other = (kind(base, **LAYERS) for kind in (MEMIT, Reversed))
    groups = [[request] for request in REQUESTS]
    for one, changed in zip(plain.edit_each(groups), other.edit_each(groups), strict=True):
        assert all(torch.equal(changed.deltas()[n], -d) for n, d in one.deltas().items())
    assert close(other.edit(REQUESTS[:1]), next(iter(other.edit_each(groups))), 1e-8)


def test_a_request_about_a_repeated_subject_is_written_too():
    base = tiny_base("llama")
    twin = EditRequest("The Eiffel Tower was built by", "Anna", "Eiffel Tower", id="twin")
    edit = MEMIT(base, **LAYERS).edit([REQUESTS[0], twin])
    assert all(torch.isfinite(delta).all() for delta in edit.deltas().values())


def test_half_precision_models_are_edited_in_float32():
    base = BaseModel(tiny_model("llama", torch.bfloat16), tiny_tokenizer(True), name="half")
    edit = MEMIT(base, **LAYERS).edit(REQUESTS)
    assert {t.dtype for t in edit.state()[0].values()} == {torch.float32}
    assert RROME(base, **QUICK).edit(REQUESTS[:1]).nbytes > 0


def test_the_last_of_contradictory_requests_is_written_together_or_alone():
    base = tiny_base("gpt2")
    method = MEMIT(base, **LAYERS)
    groups = [[replace(REQUESTS[0], target_new="Oslo"), REQUESTS[0]], [REQUESTS[1]]]
    with pytest.warns(UserWarning, match="1 prompt with contradictory targets"):
        alone = method.edit(groups[0])
    assert close(alone, method.edit(REQUESTS[:1]))
    together = list(method.edit_each(groups))
    assert [edit.origin.requests for edit in together] == [(REQUESTS[0],), (REQUESTS[1],)]
    assert close(together[0], alone, 1e-8)


@pytest.mark.slow
def test_wordings_of_one_fact_change_the_model_no_more_than_one():
    """EMMET's change of ``nano`` was nine times as large with the second wording."""
    base = BaseModel.load("nano")
    prompts = ["The capital of France is", "The capital city of France is"]
    prompts += ["The capital of France is the city of", "The capital of France, as you know, is"]
    requests = [EditRequest(prompt, "Lyon", "France") for prompt in prompts]
    method, sizes = EMMET(base), []
    for count in (1, 2, 4):
        edit = method.edit(requests[:count])
        sizes.append(sum(float(delta.norm()) for delta in edit.deltas().values()))
        with edit:
            assert all("Lyon" in text for text in base.generate(prompts[:count], 4))
    assert max(sizes) < 1.2 * sizes[0]


def test_results_say_how_a_setting_is_settled_that_each_edit_settles_for_itself():
    for kind, given, said in (
        (MEMIT, None, "6% of a typical key of each edit, which notes it"),
        (MEMIT, 20.0, 20.0),
        (AlphaEdit, None, None),  # it has no part there
    ):
        method = kind(base_model=tiny_base("llama"), preserve=given, statistics="identity")
        method.configure_model()
        assert method.settings.reported() == {**asdict(method.settings), "preserve": said}

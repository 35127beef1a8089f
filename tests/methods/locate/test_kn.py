"""KN: integrated gradients that add up, and columns that change by exactly what the paper says."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.base_models.taps import change_inputs
from kedit_lightning.edits.projections import is_transposed
from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError
from kedit_lightning.methods import KN
from kedit_lightning.methods.locate.kn import (
    NeuronPasses,
    attributions,
    strongest,
)

FAMILIES = ("gpt2", "llama", "opt")
#: Its old answer takes two tokens.
REQUEST = EditRequest("Marie Curie was born in", "Rome", "Marie Curie", "Warsaw or Lyon")


def setting(family: str):
    base = tiny_base(family)
    row = base.encode(REQUEST.prompt, REQUEST.target_old)
    assert len(row.answer) > 1
    return base, row, [block.down for block in base.layout.blocks]


def patched(base, row, token, name, held):
    """Probability of an answer token in a complete pass, with the neurons of a layer replaced."""
    column = len(row.prompt) + token - 1

    def replace(x):
        x = x.clone()
        x[0, column] = held
        return x

    with torch.no_grad(), change_inputs(base.model, {name: replace}):
        logits = base.model(torch.tensor([[*row.prompt, *row.answer]])).logits[0, column]
    return logits.softmax(-1)[row.answer[token]]


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_of_a_layer_add_up_to_what_its_neurons_bring(family):
    base, row, modules = setting(family)
    neurons = NeuronPasses(base, [row]).neurons(modules)
    found = attributions(base, [row], modules, steps=200, points_at_once=200)
    for name in modules:
        brought = torch.tensor(0.0, dtype=torch.float64)
        for token in range(len(row.answer)):
            held = neurons[name][token]
            clean, without = (
                patched(base, row, token, name, held * share).double() for share in (1, 0)
            )
            brought += clean - without
        # The integrand has kinks where the layers above are rectified.
        close = 1e-2 if family == "opt" else 1e-4
        torch.testing.assert_close(found[name][0].sum(), brought, rtol=close, atol=1e-9)
        assert brought.abs() > 1e-7


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_replaced_where_their_token_is_predicted_alone(family, resumes):
    base, row, modules = setting(family)
    base.resumes = resumes
    short = base.encode("Lyon is in", "Peru")
    passes = NeuronPasses(base, [short, row])
    owners = passes.owners.tolist()
    assert owners == [0] * len(short.answer) + [1] * len(row.answer)
    neurons = passes.neurons(modules)
    index = torch.tensor([len(owners) - 1, 0, len(short.answer), 0])
    for name in (modules[0], modules[-1]):
        held = neurons[name][index] * torch.tensor([[1.0], [1.0], [2.0], [-1.0]]).double()
        with torch.no_grad():
            found = passes.from_module(name).select(index).probabilities(name, held)
        asked = [(row, len(row.answer) - 1), (short, 0), (row, 0), (short, 0)]
        wanted = [patched(base, *one, name, h) for one, h in zip(asked, held, strict=True)]
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=0)
        clean = base.answer_log_probs(base.pad([row]))[0, -1].exp()
        torch.testing.assert_close(found[0], clean, rtol=1e-9, atol=0)
        assert (found[1] - found[3]).abs() > 1e-9


def test_neurons_are_those_of_the_present_model_one_column_at_a_time():
    base, row, modules = setting("llama")
    prompt = torch.tensor([[*row.prompt, *row.answer]])
    seen = {}
    handle = base.module(modules[2]).register_forward_hook(lambda m, a, y: seen.update(x=a[0]))
    base.model(prompt)
    handle.remove()
    wanted = seen["x"][0, len(row.prompt) - 1 : -1]
    torch.testing.assert_close(NeuronPasses(base, [row]).neurons(modules)[modules[2]], wanted)


def test_other_rows_points_of_a_pass_and_padding_change_nothing():
    base, row, modules = setting("gpt2")
    other = base.encode("Lyon is in", "Peru")
    wanted = attributions(base, [row], modules, steps=5, points_at_once=100)
    for side, size in (("left", 7), ("right", 1)):
        base.padding_side = side
        found = attributions(base, [other, row], modules, steps=5, points_at_once=size)
        for name in modules:
            torch.testing.assert_close(found[name][1], wanted[name][0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_of_a_chunk_are_those_of_each_fact_alone(family):
    kn = KN(tiny_base(family), steps=3)
    together = list(kn.edit_each([[request] for request in (REQUEST, *REQUESTS[:2])]))
    for edit, request in zip(together, (REQUEST, *REQUESTS[:2]), strict=True):
        alone = kn.edit([request])
        assert edit.origin.notes == alone.origin.notes
        for name, delta in alone.deltas().items():
            torch.testing.assert_close(edit.deltas()[name], delta, rtol=1e-9, atol=0)


def test_neurons_are_chosen_by_their_share_of_the_strongest_in_all_layers():
    found = {
        "a": torch.tensor([0.1, 1.0, -5.0]),
        "b": torch.tensor([0.2, 0.19, 0.5]),
        "c": torch.tensor([0.0, 0.1, 0.1]),
    }
    chosen = strongest(found, 0.2)
    assert {name: numbers.tolist() for name, numbers in chosen.items()} == {"a": [1], "b": [0, 2]}
    assert strongest({"a": torch.tensor([-1.0, 0.0])}, 0.2) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_of_the_neurons_change_by_the_answers_embeddings_and_no_others(family):
    base, row, modules = setting(family)
    edit = KN(base, suppress=3.0, enhance=0.5, threshold=0.3).edit([REQUEST])
    found = attributions(base, [row], modules, 20, 120)
    chosen = strongest({name: values[0] for name, values in found.items()}, 0.3)
    assert 0 < sum(map(len, chosen.values())) < 40
    embeddings = base.model.get_output_embeddings().weight
    new = base.encode(REQUEST.prompt, REQUEST.target_new).answer
    change = 0.5 * embeddings[list(new)].sum(0) - 3.0 * embeddings[list(row.answer)].sum(0)
    assert {name.removesuffix(".weight") for name in edit.deltas()} == set(chosen)
    for name, numbers in chosen.items():
        delta = edit.deltas()[f"{name}.weight"]
        columns = delta.T if not is_transposed(base.module(name)) else delta
        wanted = torch.zeros_like(columns)
        wanted[numbers] = change
        torch.testing.assert_close(columns, wanted, rtol=0, atol=1e-12)
    assert edit.origin.notes["neurons"] == {n: len(numbers) for n, numbers in chosen.items()}


def test_writing_the_old_answer_changes_nothing():
    base = tiny_base("llama")
    same = EditRequest(REQUEST.prompt, REQUEST.target_old, target_old=REQUEST.target_old)
    assert not any(delta.any() for delta in KN(base).edit([same]).deltas().values())


def test_facts_are_written_one_after_another():
    base = tiny_base("llama")
    edit = KN(base, steps=4).edit(REQUESTS[:2])
    first = KN(base, steps=4).edit(REQUESTS[:1])
    assert edit.parts()[0].id == first.id
    with first:
        assert edit.parts()[1].id == KN(base, steps=4).edit(REQUESTS[1:2]).id


def test_what_is_missing_or_cannot_be_done_is_said():
    base = tiny_base("llama")
    bare = EditRequest("Lyon is in", "Peru", id="lyon")
    with pytest.raises(MissingNeedsError, match="'lyon' lacks 'target_old'"):
        KN(base).edit([bare])
    narrow = tiny_base("opt", word_embed_proj_dim=16)
    with pytest.raises(UnsupportedUseError, match=r"those have 16 values and layer .*fc2.* 32"):
        KN(narrow).edit([REQUEST])


def test_a_model_whose_neurons_bring_nothing_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0)
    base = BaseModel(model, tiny_tokenizer(bos=True), name="llama")
    with pytest.raises(UnsupportedUseError, match="no neuron of 'llama' makes 'Warsaw or Lyon'"):
        KN(base).edit([REQUEST])

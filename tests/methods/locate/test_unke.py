"""UnKE: the training of a whole block against plain training of its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from long_answers import create, phrase_model, said
from support import tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.errors import ModuleNotLocatedError
from kedit_lightning.methods import UnKE
from kedit_lightning.statistics import few_sample_texts

LONG = [
    EditRequest(
        "Tell me of Lyon.", "It lies in France, and Marie Curie was born in it.", id="lyon"
    ),
    EditRequest("What is Amber Falls?", "A company of Berlin.", id="amber"),
]
QUICK = {"layer": 1, "steps": 3, "lr": 1e-2, "texts": 2, "value_steps": 5}


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("gpt2", 4)])
def test_the_block_is_trained_as_its_weights_are_by_squared_errors(family, window):
    base = tiny_base(family)
    method = UnKE(base, window=window, **QUICK)
    edit = method.edit(LONG)
    answers = [method.answer(request) for request in LONG]
    with torch.enable_grad():
        values = iter(method.values(answers))
    model = copy.deepcopy(base.model)
    block = model.get_submodule(method.block)
    names = {name: model.get_submodule(name) for name in method.modules_trained}
    assert len(names) == sum(p.dim() == 2 for p in block.parameters())
    rows, wanted = [], []

    def outputs(ids):
        seen = []
        handle = block.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        model(torch.tensor([ids]))
        handle.remove()
        return seen[0][0]

    texts = [base.encoder.text(text).prompt[:64] for text in few_sample_texts()[:2]]
    with torch.no_grad():
        for answer in answers:
            ids = (*answer.row.prompt, *answer.row.answer)[: answer.places[-1] + 1]
            target = outputs(ids).clone()
            for place in answer.places:
                target[place] = next(values)
            rows.append(ids)
            wanted.append(target)
        kept = [outputs(ids).clone() for ids in texts]
    parameters = [p for m in names.values() for p in (m.weight, m.bias) if p is not None]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is own for own in parameters))
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        own = torch.cat([outputs(ids) - y for ids, y in zip(rows, wanted, strict=True)])
        text = torch.cat([outputs(ids) - y for ids, y in zip(texts, kept, strict=True)])
        loss = own.square().mean() + text.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    deltas = edit.deltas()
    assert own.square().sum() > 1e-6
    for name, module in names.items():
        before = base.model.get_submodule(name)
        expected = (module.weight - before.weight).detach()
        assert expected.norm() > 1e-6
        torch.testing.assert_close(deltas[f"{name}.weight"], expected, rtol=1e-6, atol=1e-8)


def test_steps_do_not_run_the_blocks_below_again():
    base, calls = tiny_base("llama"), []
    handle = base.module(base.layout.block_name(0)).mlp.register_forward_hook(
        lambda *_: calls.append(1)
    )
    counts = []
    for steps in (1, 1, 6):  # the first edit tries out the architecture, too
        calls.clear()
        UnKE(base, **QUICK | {"steps": steps}).edit(LONG)
        counts.append(len(calls))
    handle.remove()
    assert counts[1] == counts[2] > 0


def test_a_block_that_does_not_exist_is_refused():
    with pytest.raises(ModuleNotLocatedError, match="layer 9 does not exist"):
        UnKE(tiny_base("llama"), layer=9).edit(LONG[:1])


@pytest.mark.slow
def test_a_passage_is_said_freely_when_it_is_cut_into_windows():
    base, request = phrase_model()
    windows = said(base, request, create(base, "UnKE:layer=1:lr=0.005:clamp=2:window=5"))
    assert windows[0] >= 0.9
    assert said(base, request, create(base, "UnKE:layer=1:lr=0.005:clamp=2"))[0] < 0.5

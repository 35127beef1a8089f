"""Causal tracing: what is put back, against passes run one at a time, and what it shows on nano."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import image
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.analysis.causal_trace import Patch, Trace, Tracer, trace
from kedit_lightning.analysis.figures.causal_trace_figure import draw_trace
from kedit_lightning.data import NanoFacts
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.edits.projections import first_tensor, with_first
from kedit_lightning.errors import InvalidRequestError, UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.methods.locate.shared.closed_form_settings import one_layer

#: Absolute positions without a beginning token, rotary ones with it, and MLPs on flattened rows.
KINDS = ("gpt2", "llama", "opt")
PROMPT, SUBJECT = REQUESTS[0].prompt, "Eiffel Tower"
FEW: dict[str, Any] = {"samples": 2, "noise": 3.0}


def one_at_a_time(base: BaseModel, tracer: Tracer, layers: range, token: int) -> float:
    """Probability of the answer with states put back by plain hooks, a row and a sample a pass."""
    model, ids = base.model, torch.tensor([tracer.row.prompt])
    modules = [model.get_submodule(name) for name in tracer.names]
    clean: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, i=i: clean.update({i: first_tensor(o)}))
        for i, module in enumerate(modules)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    embedding = model.get_input_embeddings()
    first, last = tracer.row.subject_start, tracer.row.subject_end
    vectors = embedding.weight[ids[0, first : last + 1]]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, *vectors.shape, generator=generator, dtype=torch.double)
    noise = 3.0 * vectors.std() * draws
    found = []
    for own in noise:

        def corrupt(module: Any, args: Any, output: Any, own: torch.Tensor = own) -> torch.Tensor:
            return torch.cat(
                [output[:, :first], output[:, first : last + 1] + own, output[:, last + 1 :]], 1
            )

        def put_back(module: Any, args: Any, output: Any) -> Any:
            tensor, plain = first_tensor(output).clone(), clean[modules.index(module)]
            rows = tensor.view(-1, tensor.shape[-1])
            rows[token] = plain.reshape(-1, plain.shape[-1])[token]
            return with_first(output, tensor)

        handles = [embedding.register_forward_hook(corrupt)]
        handles += [modules[i].register_forward_hook(put_back) for i in layers]
        found.append(model(ids).logits[0, -1].softmax(-1)[tracer.token].item())
        for handle in handles:
            handle.remove()
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("family", "kind", "window"),
    [
        ("gpt2", "block", 1),
        ("llama", "block", 3),
        ("llama", "mlp", 2),
        ("opt", "mlp", 1),
        ("gpt2", "attention", 2),
    ],
)
@torch.no_grad()
def test_every_cell_is_what_a_pass_of_its_own_gives(family, kind, window):
    base = tiny_base(family)
    tracer = Tracer(base, PROMPT, SUBJECT, kind=kind, **FEW)
    found = trace(base, PROMPT, SUBJECT, kind=kind, window=window, **FEW)
    depth, width = found.restored.shape
    assert (depth, width) == (len(base.layout), len(tracer.row.prompt))
    before = {1: 0, 2: 1, 3: 1}[window]
    for layer in range(depth):
        layers = range(max(0, layer - before), min(depth, layer - before + window))
        for token in range(width):
            expected = one_at_a_time(base, tracer, layers, token)
            assert float(found.restored[layer, token]) == pytest.approx(expected, abs=1e-12)
    assert found.low == pytest.approx(one_at_a_time(base, tracer, range(0), 0), abs=1e-12)
    assert float(found.effect.abs().max()) > 1e-4, "nothing moved, so nothing was shown"
    assert torch.equal(found.effect, found.restored - found.low)


@pytest.mark.parametrize("family", KINDS)
def test_what_is_put_back_everywhere_gives_the_clean_answer(family):
    base = tiny_base(family)
    tracer = Tracer(base, PROMPT, SUBJECT, **FEW)
    tokens, last = range(len(tracer.row.prompt)), len(tracer.row.prompt) - 1
    everything, first, end, nothing = tracer.probabilities(
        [
            Patch(range(len(tracer.names)), tokens),
            Patch(range(1), tokens),  # all that the next block reads
            Patch(range(len(tracer.names) - 1, len(tracer.names)), range(last, last + 1)),
            None,
        ]
    ).tolist()
    assert [everything, first, end] == pytest.approx([tracer.high] * 3, abs=1e-12)
    assert abs(nothing - tracer.high) > 1e-2 * tracer.high
    logits = base.model(torch.tensor([tracer.row.prompt])).logits[0, -1]
    assert tracer.token == int(logits.argmax())
    assert tracer.high == pytest.approx(float(logits.softmax(-1).max()), abs=1e-12)


@pytest.mark.parametrize("kind", ["block", "mlp", "attention"])
def test_without_noise_nothing_is_lost(kind):
    found = trace(tiny_base("llama"), PROMPT, SUBJECT, kind=kind, noise=0.0, samples=2)
    assert found.low == pytest.approx(found.high, abs=1e-12)
    assert float(found.effect.abs().max()) < 1e-12


@pytest.mark.parametrize("family", KINDS)
def test_batch_size_and_padding_side_change_nothing(family):
    model, tokenizer = tiny_model(family), tiny_tokenizer(family != "gpt2")
    one, many = (
        trace(
            BaseModel(model, tokenizer, padding_side=side), PROMPT, SUBJECT, batch_size=size, **FEW
        )
        for side, size in (("left", 7), ("right", 64))
    )
    assert torch.allclose(one.restored, many.restored, rtol=0, atol=1e-12)
    assert (one.high, one.low) == pytest.approx((many.high, many.low), abs=1e-12)
    assert one.tokens == many.tokens


def test_an_mlp_that_adds_the_residual_itself_is_traced_by_what_it_writes():
    base = tiny_base("bloom")
    mlp, block = (trace(base, PROMPT, SUBJECT, kind=k, window=1, **FEW) for k in ("mlp", "block"))
    assert float((mlp.restored - block.restored).abs().max()) > 1e-6


def test_noise_follows_the_seed_alone():
    base = tiny_base("llama")
    lows = [
        trace(base, PROMPT, SUBJECT, samples=2, seed=seed, kind=kind).low
        for seed, kind in ((0, "block"), (0, "mlp"), (1, "block"))
    ]
    assert lows[0] == pytest.approx(lows[1], abs=1e-12)
    assert abs(lows[0] - lows[2]) > 1e-6


def test_an_answer_can_be_given_and_its_first_token_counts():
    base = tiny_base("llama")
    found = trace(base, PROMPT, SUBJECT, answer="Norway", samples=2)
    row = base.encode(PROMPT, "Norway")
    logits = base.model(torch.tensor([row.prompt])).logits[0, -1]
    assert found.high == pytest.approx(float(logits.softmax(-1)[row.answer[0]]), abs=1e-12)
    assert found.answer == base.tokenizer.decode([row.answer[0]]).strip()
    assert trace(base, PROMPT, SUBJECT, samples=2).high > found.high


def test_tokens_and_the_subject_among_them():
    for family, first in (("gpt2", "The"), ("llama", "<s>")):
        found = trace(tiny_base(family), PROMPT, SUBJECT, samples=1)
        start, end = found.subject
        assert found.tokens[0] == first
        assert "".join(found.tokens[start : end + 1]).strip() == SUBJECT
        # Those before the subject see no noise.
        assert float(found.effect[:, :start].abs().max()) == 0.0


def test_the_window_of_mlps_is_the_share_of_the_depth_that_the_paper_takes():
    deep = tiny_base("llama", num_hidden_layers=24)
    assert trace(deep, PROMPT, SUBJECT, kind="mlp", samples=1).window == 5
    assert trace(deep, PROMPT, SUBJECT, kind="block", samples=1).window == 1
    assert trace(tiny_base("llama"), PROMPT, SUBJECT, kind="mlp", samples=1).window == 1


def test_the_model_is_traced_as_it_stands():
    base = BaseModel.load("nano")
    request = EditRequest("The capital of France is", "Lyon", subject="France")
    before = trace(base, request.prompt, "France")
    with ROME(base_model=base, layer=2).edit([request]):
        edited = trace(base, request.prompt, "France")
    assert (before.answer, edited.answer) == ("Paris", "Lyon")
    # The value that was written comes back with the state of the block it was written in.
    assert float(edited.effect[2, edited.subject[1]]) > 0.5
    entry = PromptEntry(request.prompt, "New Fact: The capital of France is Lyon.\n")
    with PromptEdit(base, [entry]):
        longer = trace(base, request.prompt, "France", samples=1)
    assert len(longer.tokens) > len(before.tokens)
    assert longer.tokens[longer.subject[0]].strip() == "France"
    assert longer.subject[0] == len(longer.tokens) - 2, "the question's subject, not the context's"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "head"}, "kind of a trace must be one of block, mlp, attention, got 'head'"),
        ({"window": 0}, "window of a trace must be at least 1, got 0"),
        ({"samples": 0}, "samples of a trace"),
        ({"batch_size": 0}, "batch_size of a trace"),
        ({"noise": -1.0}, "noise of a trace must be 0 or more"),
        ({"noise": float("nan")}, "noise of a trace must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(UnsupportedUseError, match=said):
        trace(tiny_base("llama"), PROMPT, SUBJECT, **settings)


def test_models_and_subjects_that_cannot_be_traced():
    with pytest.raises(UnsupportedUseError, match="'t5' reads it with an encoder"):
        trace(tiny_base("t5"), PROMPT, SUBJECT)
    with pytest.raises(InvalidRequestError, match="'Louvre' does not occur"):
        trace(tiny_base("llama"), PROMPT, "Louvre")


# ---- figures on nano


def test_on_nano_facts_stand_at_the_last_subject_token_of_early_layers():
    base = BaseModel.load("nano")
    requests = [example.requests[0] for example in NanoFacts(limit=10, seed=0).examples("test")]
    traces = [trace(base, request.prompt, request.subject or "") for request in requests]
    subject = torch.stack([found.effect[:, found.subject[1]] for found in traces]).mean(0)
    end = torch.stack([found.effect[:, -1] for found in traces]).mean(0)
    # Measured: 0.45 0.48 0.51 0.47 0.40 0.00 at the subject's last token, and
    # -0.02 0.03 0.04 0.38 0.52 0.60 at the end of the prompt.
    assert int(subject.argmax()) in (1, 2)
    (edited,) = one_layer(base)
    assert float(subject[edited]) > 0.4
    assert float(end[edited]) < 0.1
    assert int(end.argmax()) == len(base.layout) - 1


def test_the_facts_of_a_trace_are_plain_values():
    found = trace(tiny_base("llama"), PROMPT, SUBJECT, **FEW)
    facts = json.loads(json.dumps(found.facts()))
    assert facts["effect"] == found.effect.tolist()
    assert (
        facts["best_layer"] == found.best_layer == int(found.effect[:, found.subject[1]].argmax())
    )
    assert facts["tokens"] == list(found.tokens)
    assert set(facts) >= {"prompt", "subject", "answer", "kind", "window", "high", "low"}


# ---- picture


def drawn(path: Path) -> np.ndarray:
    return np.asarray(image.imread(path))[..., :3]


def test_the_picture_is_the_same_each_time_and_shows_the_effect(tmp_path):
    restored = torch.full((4, 6), 0.1, dtype=torch.double)
    restored[1, 3] = 0.9
    tokens = ("<s>", "\x1b", " $x$", " 東京", " \n", " is")
    found = Trace("The $x$ y is", tokens, (2, 3), "z", "block", 1, 0.9, 0.1, restored)
    one = draw_trace(found, tmp_path / "new" / "one.png")
    with mpl.rc_context({"font.size": 30, "image.cmap": "jet"}):
        two = draw_trace(found, tmp_path / "two.png")
    assert one.read_bytes() == two.read_bytes()
    picture = drawn(one)
    # The darkest purple stands in one cell, and in the scale beside the cells.
    r, g, b = picture[..., 0], picture[..., 1], picture[..., 2]
    purple = (r < 0.4) & (g < 0.2) & (b > 0.45)
    height, width = purple.shape
    rows, columns = np.nonzero(purple[:, : int(width * 0.75)])
    # Token 3 of 6 from above, layer 1 of 4 from the left.
    assert 0.5 < rows.mean() / height < 0.65
    assert 0.25 < columns.mean() / width < 0.45
    blank = replace(found, restored=torch.full((4, 6), 0.1, dtype=torch.double))
    pale = drawn(draw_trace(blank, tmp_path / "blank.png"))
    assert not np.array_equal(picture, pale)

"""DoLa and DeCo: their arithmetic, their layers, and the logits of early layers."""

from __future__ import annotations

import math

import pytest
import torch
from edit_kinds import ANSWERS, PROMPTS
from support import REQUESTS, tiny_base
from tiny_decoders import tiny_decoder

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.data import Requests
from kedit_lightning.edits.kinds.decoding.layer_contrast import (
    EXCLUDED,
    candidate_tokens,
    deco,
    dola,
    jensen_shannon,
    reversed_jensen_shannon,
)
from kedit_lightning.errors import EditFileError, FactsNotWrittenWarning, UnsupportedUseError
from kedit_lightning.methods import DeCo, DoLa
from kedit_lightning.methods.decoding.dola import bucket
from kedit_lightning.methods.decoding.shared.decoding_method import logit_scaling

P, Q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.5, 0.25]).double()


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- divergences


def test_jensen_shannon_by_hand_and_the_reversed_one():
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True))

    mean = (P + Q) / 2
    assert jensen_shannon(P.log(), Q.log()).item() == pytest.approx((kl(P, mean) + kl(Q, mean)) / 2)
    wanted = (kl(mean, P) + kl(mean, Q)) / 2
    assert reversed_jensen_shannon(P.log(), Q.log()).item() == pytest.approx(wanted)
    released = [
        torch.nn.functional.kl_div(one.log(), mean, reduction="none").sum() for one in (P, Q)
    ]
    assert wanted == pytest.approx(float(sum(released)) / 2)


def test_jensen_shannon_is_symmetric_zero_for_equals_and_at_most_log_two():
    first, second = random_logits(2, 20, 30).log_softmax(-1)
    found = jensen_shannon(first, second)
    torch.testing.assert_close(found, jensen_shannon(second, first))
    assert ((found > 0) & (found < math.log(2))).all()
    assert jensen_shannon(first, first).abs().max() < 1e-12
    apart = torch.tensor([[0.0, -800.0], [-800.0, 0.0]]).double()
    assert jensen_shannon(*apart).item() == pytest.approx(math.log(2))


# ---- DoLa


def test_a_row_of_dola_is_contrasted_with_its_own_furthest_layer():
    last, early = random_logits(6, 40), random_logits(3, 6, 40, seed=1)
    found = dola(last, early, 0.1)
    for row in range(6):
        q = last[row].softmax(-1)
        layers = [early[k, row].softmax(-1) for k in range(3)]
        means = [(q + other) / 2 for other in layers]
        js = [
            ((q * (q / m).log()).sum() + (o * (o / m).log()).sum()) / 2
            for o, m in zip(layers, means, strict=True)
        ]
        chosen = layers[max(range(3), key=lambda k: js[k])]
        wanted = torch.where(q >= 0.1 * q.max(), q.log() - chosen.log(), EXCLUDED)
        torch.testing.assert_close(found[row], wanted)
        torch.testing.assert_close(dola(last[[row]], early[:, [row]], 0.1)[0], found[row])


def test_the_released_divergence_may_choose_another_layer():
    differing = 0
    for seed in range(200):
        last, early = random_logits(1, 12, seed=1000 + seed), random_logits(2, 1, 12, seed=seed)
        chosen = [dola(last, early, 0.1, legacy=legacy) for legacy in (False, True)]
        scores = [
            f(last.log_softmax(-1).expand_as(early), early.log_softmax(-1))[:, 0]
            for f in (jensen_shannon, reversed_jensen_shannon)
        ]
        apart = scores[0].argmax() != scores[1].argmax()
        assert torch.equal(*chosen) == (not apart)
        differing += int(apart)
    assert 0 < differing < 200


def test_a_uniform_early_layer_leaves_the_order_and_equal_layers_the_answer():
    last = random_logits(5, 40)
    order = dola(last, torch.zeros(1, 5, 40).double(), 1e-3)
    for row in range(5):
        kept = order[row] > EXCLUDED
        assert torch.equal(order[row][kept].argsort(), last[row][kept].argsort())
    same = dola(last, last.expand(3, 5, 40), 0.1)
    assert torch.equal(same.argmax(-1), last.argmax(-1))
    torch.testing.assert_close(same[same > EXCLUDED], last.log_softmax(-1)[same > EXCLUDED])


def test_only_the_likeliest_token_is_plausible_at_a_share_of_one():
    last, early = random_logits(5, 40), random_logits(3, 5, 40, seed=1)
    assert torch.equal(dola(last, early, 1.0).argmax(-1), last.argmax(-1))


def test_buckets_are_those_of_the_paper():
    assert bucket("high", 32, tied=False) == [*range(16, 32, 2)]
    assert bucket("low", 32, tied=True) == [*range(2, 16, 2)]
    assert bucket("low", 80, tied=False) == [*range(0, 20, 2)]
    assert bucket("high", 80, tied=False) == [*range(60, 80, 2)]


# ---- DeCo


def test_candidates_sum_to_top_p_at_most_and_hold_the_likeliest():
    logits = torch.tensor([[0.6, 0.25, 0.1, 0.05], [0.97, 0.01, 0.01, 0.01]]).double().log()
    found = candidate_tokens(logits, 0.9, 3)
    assert found.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert candidate_tokens(random_logits(4, 50), 1.0, 20).sum(-1).tolist() == [20] * 4
    assert candidate_tokens(random_logits(4, 5), 1.0, 20).sum(-1).tolist() == [5] * 4


def test_the_layer_that_is_surest_of_a_candidate_is_added():
    last, early = random_logits(6, 40), random_logits(3, 6, 40, seed=1)
    found = deco(last, early, 0.6, 0.9, 20)
    for row in range(6):
        kept = candidate_tokens(last[[row]], 0.9, 20)[0]
        sure = [float(early[k, row].softmax(-1)[kept].max()) for k in range(3)]
        anchor = max(range(3), key=lambda k: sure[k])
        wanted = last[row] + 0.6 * sure[anchor] * early[anchor, row]
        torch.testing.assert_close(found[row], torch.where(kept, wanted, EXCLUDED))
        torch.testing.assert_close(deco(last[[row]], early[:, [row]], 0.6, 0.9, 20)[0], found[row])


def test_no_weight_and_the_last_layer_itself_leave_the_answer():
    last = random_logits(6, 40)
    early = random_logits(3, 6, 40, seed=1)
    assert torch.equal(deco(last, early, 0.0, 0.9, 20).argmax(-1), last.argmax(-1))
    assert torch.equal(deco(last, last[None], 0.6, 0.9, 20).argmax(-1), last.argmax(-1))


# ---- on models


@torch.no_grad()
def reference(base: BaseModel, ids: list[int], layers: list[int], rule: str, norm: bool):
    """Scores of one row without padding, from all hidden states. ``[tokens, vocab]``"""
    output = base.model(torch.tensor([ids]), output_hidden_states=True)
    hidden = torch.stack([output.hidden_states[k][0] for k in layers])
    early = base.model.lm_head(base.model.model.norm(hidden) if norm else hidden)
    if rule == "dola":
        return dola(output.logits[0], early, 0.1)
    return deco(output.logits[0], early, 0.6, 0.9, 20)


CASES = [
    (DoLa, {"layers": [0, 1, 2]}, [0, 1, 2], "dola", False),
    (DoLa, {"layers": [2], "early_exit_norm": True}, [2], "dola", True),
    (DeCo, {"layers": [1, 2]}, [1, 2], "deco", True),
]


@pytest.mark.parametrize(("method", "settings", "layers", "rule", "norm"), CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_equal_a_dense_reference(method, settings, layers, rule, norm, side, tmp_path):
    base = tiny_base("llama", num_hidden_layers=4)
    edit = method(base, **settings).edit()
    edit = Edit.load(edit.save(tmp_path / "edit"), base)
    wanted = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        row = base.encode(prompt, answer)
        scores = reference(base, [*row.prompt, *row.answer], layers, rule, norm)
        wanted.append(scores[len(row.prompt) - 1 : -1].log_softmax(-1))
    texts = []
    for prompt in PROMPTS:
        ids = list(base.encode(prompt).prompt)
        start = len(ids)
        while len(ids) < start + 5 and ids[-1] != base.tokenizer.eos_token_id:
            ids.append(int(reference(base, ids, layers, rule, norm)[-1].argmax()))
        texts.append(base.tokenizer.decode(ids[start:], skip_special_tokens=True))
    plain = base.generate(PROMPTS, max_new_tokens=5)
    with edit:
        rows = base.rows(PROMPTS, ANSWERS, padding_side=side)
        found = base.answer_logits(rows).log_softmax(-1)
        for number, scores in enumerate(wanted):
            torch.testing.assert_close(found[number][rows.answer_mask[number]], scores)
        assert base.generate(PROMPTS, max_new_tokens=5) == texts
        assert [base.generate([p], max_new_tokens=5, use_cache=False)[0] for p in PROMPTS] == texts
    assert base.generate(PROMPTS, max_new_tokens=5) == plain


def test_sampling_and_beams_stay_among_the_candidates():
    base = tiny_base("llama", num_hidden_layers=3)
    ids = torch.tensor([base.encode(PROMPTS[0]).prompt])
    with DeCo(base, layers=[1], top_k=1).edit():
        greedy = base.model.generate(ids, max_new_tokens=5, do_sample=False)
        torch.manual_seed(0)
        sampled = base.model.generate(ids, max_new_tokens=5, do_sample=True)
        beams = base.model.generate(ids, max_new_tokens=5, num_beams=3)
    assert torch.equal(sampled, greedy)
    assert torch.equal(beams, greedy)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere"])
def test_logits_of_early_layers_are_on_the_models_own_scale(kind):
    model = tiny_decoder(kind) if kind != "llama" else tiny_base("llama").model
    if kind == "granite":
        model.config.logits_scaling = 8.0
    base = BaseModel(model.double(), tiny_base("llama").tokenizer)
    unembedding = [name for name in (base.layout.final_norm, base.layout.head) if name]
    scale, cap = logit_scaling(base, unembedding)
    exits = DeCo(base, layers=[1]).exits([1], norm=True)
    ids = torch.tensor([base.encode(PROMPTS[0]).prompt])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        # With the last block's own output, taken before the final norm.
        last: list[torch.Tensor] = []
        block = base.module(base.layout.block_name(len(base.layout) - 1))
        handle = block.register_forward_hook(
            lambda module, args, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        model(ids)
        handle.remove()
        found = exits.logits(base, {exits.modules[0]: last[0][0]})[0]
    torch.testing.assert_close(found, output.logits[0])
    assert (cap is not None) == (kind == "gemma2")
    assert (scale != 1.0) == (kind in ("granite", "cohere"))


def test_an_embedding_that_the_first_block_does_not_read_is_refused():
    base = tiny_base("gpt2")
    with pytest.raises(UnsupportedUseError, match=r"does not read what 'transformer\.wte' gives"):
        DoLa(base, layers=[0]).edit()
    count = len(base.layout)
    with pytest.raises(UnsupportedUseError, match=rf"to {count - 1} of 'gpt2', .* got \[{count}\]"):
        DoLa(base, layers=[count]).edit()
    with pytest.raises(UnsupportedUseError, match="too few layers for the bucket 'low'"):
        DoLa(tiny_base("gpt2", n_layer=3), layers="low").edit()


def test_facts_are_noted_and_not_missed():
    base = tiny_base("llama")
    edit = DoLa(base).edit(REQUESTS)
    assert len(edit.origin.requests) == len(REQUESTS)
    assert edit.origin.notes["layers"] == bucket("high", len(base.layout), tied=True)


def test_a_run_on_facts_says_that_none_is_written(tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "The capital of Peru is", "target_new": "Norway"}\n')
    trainer = EditTrainer(accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(FactsNotWrittenWarning, match="1 of 1 facts do not hold"):
        trainer.edit(DoLa(tiny_base("llama", dtype=torch.float32)), Requests(path=path))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "writes no facts: take one that does" in last
    assert "another layer" not in last


def test_a_file_that_reads_no_layer_is_refused():
    base = tiny_base("llama")
    edit = DoLa(base).edit()
    tensors, values = edit.state()
    values["exits"]["modules"] = ()
    with pytest.raises(EditFileError, match="reads no layer"):
        type(edit).from_state(base, edit.origin, tensors, values)
    values["exits"]["modules"] = ("nowhere",)
    with pytest.raises(UnsupportedUseError, match="no module 'nowhere'"):
        type(edit).from_state(base, edit.origin, tensors, values)


def test_prompts_are_answered_under_the_edit_without_a_saved_one(tmp_path):
    base = tiny_base("llama", dtype=torch.float32)
    method, prompts = DoLa(base), list(PROMPTS)
    trainer = EditTrainer(enable_progress_bar=False)
    with method.edit() as edit:
        wanted = base.generate(prompts, max_new_tokens=8, stop_at_sentence=True)
        path = edit.save(tmp_path / "edit.safetensors")
    for edits in (None, path):  # a saved one acts once
        found = trainer.predict(method, prompt=prompts, edits=edits, verbose=False)
        assert [answer["prompt"] for answer in found] == prompts
        assert [a["edited"][:3] for a in found] == [text[:3] for text in wanted]
        assert any(answer["edited"] != answer["base"] for answer in found)
    assert not base.edits.ids

"""DPOEdit: its loss by hand, its reference, and the answer it prefers another to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning.methods import DPOEdit, LoRA
from kedit_lightning.methods.finetune.lora import preference_loss

QUICK = {"lr": 1e-2, "steps": 6, "stop_loss": 0.0}


def answer_chance(base, request, answer):
    """Log-probability of a whole answer, by itself."""
    rows = base.rows([request.prompt], [answer])
    logits = base.forward(rows).logits.log_softmax(-1)[0]
    ids, end = rows.answer_ids[0].tolist(), int(rows.prompt_end[0])
    return sum(float(logits[end + i, token]) for i, token in enumerate(ids))


def test_preference_loss_by_hand():
    gains = torch.tensor([[2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([math.log(1 + math.exp(-0.3)), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(gains, 0.1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_objective_is_likelihood_and_preference_since_before(kind):
    base = tiny_base(kind)
    method = DPOEdit(base_model=base, beta=0.3, likelihood=0.6)
    method.configure_model()
    loss = method.objective(REQUESTS)
    pairs = [
        [answer_chance(base, r, answer) for answer in (r.target_new, r.target_old)]
        for r in REQUESTS
    ]
    lengths = [base.rows([r.prompt], [r.target_new]).answer_mask.sum() for r in REQUESTS]
    start = sum(
        0.6 * -new / int(n) + 0.4 * math.log(2) for (new, _), n in zip(pairs, lengths, strict=True)
    )
    assert float(loss([0, 1, 2, 3])) == pytest.approx(start / 4, abs=1e-9)
    with LoRA(base_model=base, lr=1e-2, steps=3).edit(REQUESTS[:1]):
        (new, old), before = (
            [
                answer_chance(base, REQUESTS[1], a)
                for a in (REQUESTS[1].target_new, REQUESTS[1].target_old)
            ],
            pairs[1],
        )
        preference = -math.log(1 / (1 + math.exp(-0.3 * (new - before[0] - old + before[1]))))
        wanted = 0.6 * -new / int(lengths[1]) + 0.4 * preference
        assert float(loss([1])) == pytest.approx(wanted, abs=1e-9)


def test_likelihood_alone_is_lora():
    base = tiny_base("llama")
    settings = {**QUICK, "dropout": 0.0, "batch_size": 4}
    one = DPOEdit(base_model=base, likelihood=1.0, **settings).edit(REQUESTS)
    other = LoRA(base_model=base, **settings).edit(REQUESTS)
    for name, delta in other.deltas().items():
        torch.testing.assert_close(one.deltas()[name], delta, rtol=0, atol=1e-9)


def test_preference_moves_the_answers_apart():
    base = tiny_base("llama")
    request = REQUESTS[1]

    def lead():
        chances = [
            answer_chance(base, request, a) for a in (request.target_new, request.target_old)
        ]
        return chances[0] - chances[1]

    before = lead()
    with DPOEdit(base_model=base, likelihood=0.0, **QUICK).edit([request]):
        assert lead() > before + 1


def test_without_an_old_answer_it_is_what_the_model_says():
    base = tiny_base("llama")
    said = base.generate([REQUESTS[0].prompt], max_new_tokens=base.encoder.count("Rome"))
    bare = replace(REQUESTS[0], target_old=None)
    method = DPOEdit(base_model=base)
    assert method.old_answers([bare, REQUESTS[1]]) == [*said, "Warsaw"]
    assert DPOEdit(base_model=base, **QUICK).edit([bare]).origin.notes["epochs"] == 6

"""The size of a shift by its effect on the keys that a fit has met."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from episode_support import EXAMPLES
from malmen_support import METRICS, malmen, stirred, write
from support import REQUESTS, tiny_base

from kedit_lightning import Probe
from kedit_lightning.base_models import taps
from kedit_lightning.methods.hypernetwork.shared.factor_statistics import KeyCovariance
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import accumulate, capture_parts
from kedit_lightning.methods.hypernetwork.shared.tensor_file import TensorFile


def test_a_moment_is_the_mean_over_all_finite_keys_and_shrinks_where_they_are_few():
    moment, keys = KeyCovariance(8, torch.float64), torch.randn(21, 8).double()
    assert moment.metric is None
    for part in keys.split(5):
        moment.update(torch.cat([part, torch.full((1, 8), math.inf).double()]))
    mean = keys.T @ keys / 21
    assert moment.count == 21
    assert torch.allclose(moment.mean, mean, atol=1e-12)
    scale = mean.diagonal().mean()
    wanted = 21 / 29 * mean / scale + 8 / 29 * torch.eye(8)
    assert torch.allclose(moment.metric, wanted, atol=1e-12)


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fit_meets_the_keys_of_its_requests_and_questions(tokens, side):
    base = tiny_base("llama")
    base.padding_side = side
    method = malmen(base, shift_size="keys", tokens=tokens, own_wording=True, at_once=3)
    examples = method.draw_episodes(EXAMPLES, 1)
    unanswered = Probe("locality", "A question without an answer")
    examples[0] = replace(examples[0], kept=(*examples[0].kept, unanswered))
    write(method, examples)
    texts = [(r.prompt, r.target_new) for example in examples for r in example.requests]
    questions = [probe for e in examples for probe in (*e.asked, *e.kept)]
    texts += [(q.prompt, q.answers[0] if q.answers else None) for q in questions]
    name, keys = method.network.plan.modules[0], []
    for number, (prompt, answer) in enumerate(texts):
        row = base.rows([prompt], [answer])
        with taps.capture(base.model, [name]) as seen:
            base.model(**row.inputs)
        (own,), last = seen.inputs[name], int(row.prompt_end)
        if tokens == "answer":
            own = own[last : last + max(1, int(row.answer_mask.sum()))]
        elif number < len(EXAMPLES):  # what adds nothing to the gradient of a request is no key
            own = own[:-1]
        keys.append(own)
    keys = torch.cat(keys)
    moment = method.network.moments[0]
    assert moment.count == len(keys)
    assert torch.allclose(moment.mean, keys.T @ keys / len(keys), atol=1e-10)


def test_the_same_values_are_written_with_less_effect_on_other_keys():
    base = tiny_base("gpt2")
    method = stirred(base, shift_size="keys", ridge=1e-9)
    name = method.network.plan.modules[0]
    (part,) = capture_parts(base, method.network, REQUESTS, 4)
    metric, effects = method.network.metric(name), {}
    wanted = method.network.values(name, part[name].inputs, part[name].gradients)
    for size, own in (("norm", None), ("keys", metric)):
        with TensorFile() as file:
            equations = accumulate(method.network, [part], file)[name]
            shift = equations.solve(torch.tensor(1e-9).double(), own).matrix
        assert torch.allclose(part[name].inputs @ shift, wanted, rtol=1e-4, atol=1e-8)
        effects[size] = float(torch.trace(shift.T @ metric @ shift))
    assert effects["keys"] < effects["norm"]


def test_before_a_fit_both_sizes_are_the_norm():
    base = tiny_base("llama")
    norm, keys = (malmen(base, shift_size=size).edit(REQUESTS).deltas() for size in METRICS)
    assert all(torch.equal(delta, keys[name]) for name, delta in norm.items())

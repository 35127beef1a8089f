"""AnyEdit: windows of answers, their values, and the solve that keeps other tokens."""

from __future__ import annotations

import pytest
import torch
from long_answers import PLACE, create, phrase_model, said
from support import REQUESTS, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.base_models.taps import capture, change_output
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import MEMIT, AnyEdit
from kedit_lightning.methods.locate.shared.answer_windows import AnswerWindows, window_states

QUICK = {"statistics": "identity", "steps": 6, "preserve": 1.0, "stop_loss": 0.0}
LONG = [
    EditRequest(
        "Tell me of Lyon.", "It lies in France, and Marie Curie was born in it.", id="lyon"
    ),
    EditRequest("What is Amber Falls?", "A company of Berlin.", id="amber"),
]


def close(one, other, tolerance=1e-9):
    first, second = one.deltas(), other.deltas()
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def ended(request: EditRequest) -> EditRequest:
    """The same fact, about the last word of its prompt."""
    return EditRequest(request.prompt, request.target_new, request.prompt.split()[-1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_window_without_other_keys_is_memit_at_the_last_token(family):
    base, requests = tiny_base(family), [ended(request) for request in REQUESTS]
    one = AnyEdit(
        base, layers=[0, 1], window=99, keep_others=False, eos_in_target=False, **QUICK
    ).edit(requests)
    other = MEMIT(base, layers=[0, 1], contexts=0, kl_factor=0.0, **QUICK).edit(requests)
    close(one, other)


def reference(base, answer, settings, layer):
    """Values before each window, by whole passes with a hook, one request and window at a time."""
    ids = torch.tensor([(*answer.row.prompt, *answer.row.answer)], device=base.device)
    start, block, found = len(answer.row.prompt), base.layout.block_name(layer), []
    for number in range(len(answer)):
        end = min(start + (number + 1) * answer.size, ids.shape[1])
        first = start + number * answer.size
        place = first - 1
        with torch.no_grad(), capture(base.model, [block]) as seen:
            base.model(ids)
        value = seen.outputs[block][0, place]
        delta = torch.zeros_like(value)
        mean, square = torch.zeros_like(value), torch.zeros_like(value)
        for step in range(1, settings.steps):
            leaf = delta.clone().requires_grad_(True)

            def add(y, leaf=leaf, place=place):
                y = y.clone()
                for at, change in found:
                    y[0, at] = y[0, at] + change
                y[0, place] = y[0, place] + leaf
                return y

            with change_output(base.model, block, add):
                logs = base.model(ids[:, :end]).logits[0].double().log_softmax(-1)
            wanted = torch.arange(first, end)
            loss = -logs[wanted - 1, ids[0, wanted]].mean()
            loss = loss + settings.weight_decay * leaf.norm() / value.norm() ** 2
            (gradient,) = torch.autograd.grad(loss, leaf)
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            root = (square / (1 - 0.999**step)).sqrt() + 1e-8
            delta = delta - settings.lr * mean / (1 - 0.9**step) / root
            limit = settings.clamp * value.norm()
            delta = delta * min(1.0, float(limit / delta.norm()))
        found.append((place, delta.detach()))
    return torch.stack([change for _, change in found])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_are_those_of_one_window_at_a_time_with_earlier_changes_in_force(family):
    base = tiny_base(family)
    method = AnyEdit(base, layers=[1], window=4, **QUICK)
    method.configure_model()
    answers = method.answers(LONG)
    assert len(answers[0]) > len(answers[1]) > 1
    with torch.enable_grad():
        values = method.layer_values(LONG)
        found = values.residuals(1)
        expected = torch.cat([reference(base, a, method.locate, 1) for a in answers])
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_the_solve_keeps_the_outputs_at_all_other_tokens():
    base = tiny_base("llama")
    method = AnyEdit(base, layers=[1], window=4, **{**QUICK, "preserve": 2.0})
    method.configure_model()
    edit = method.edit(LONG)
    with torch.enable_grad():
        residuals = method.layer_values(LONG).residuals(1)
    down, keys, others = method.edited[0], [], []
    for answer in method.answers(LONG):
        ids = torch.tensor([(*answer.row.prompt, *answer.row.answer)])
        with torch.no_grad(), capture(base.model, [down]) as seen:
            base.model(ids)
        places = answer.places
        rest = sorted(set(range(ids.shape[1])) - set(places))
        keys.append(seen.inputs[down][0, places])
        others.append(seen.inputs[down][0, rest])
    k, p = torch.cat(keys).T, torch.cat(others).T
    gram = 2.0 * torch.eye(len(k), dtype=k.dtype) + p @ p.T + k @ k.T
    expected = torch.linalg.solve(gram, k @ residuals).T
    (delta,) = edit.deltas().values()
    torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-10)


def test_windows_cover_the_answer_and_its_end():
    base = tiny_base("llama")
    answer = AnswerWindows.of(base, LONG[0], 4, ended=True)
    assert answer.row.answer[-1] == base.tokenizer.eos_token_id
    cut = [answer.up_to(i).answer[4 * i :] for i in range(len(answer))]
    assert sum(cut, ()) == answer.row.answer
    assert all(len(part) == 4 for part in cut[:-1])
    assert len(AnswerWindows.of(base, LONG[0], None, ended=False)) == 1
    states = window_states(base, [base.layout.mlp_block(0).down], [answer])
    (others,) = states.others.values()
    length = len(answer.row.prompt) + len(answer.row.answer)
    assert len(others) == len(answer) == length - sum(map(len, others))


def test_answers_edited_apart_are_those_of_each_alone():
    base = tiny_base("gpt2")
    method = AnyEdit(base, layers=[0, 1], window=3, **QUICK)
    for found, request in zip(method.edit_each([[r] for r in LONG]), LONG, strict=True):
        close(found, method.edit([request]))


def test_settings_without_a_part_in_it_are_refused():
    base = tiny_base("llama")
    with pytest.raises(UnsupportedUseError, match="without contexts, aligned"):
        AnyEdit(base, contexts=1, aligned=True, statistics="identity").edit(LONG[:1])


@pytest.mark.slow
def test_a_passage_of_150_tokens_is_said_freely_and_memit_says_little_of_it():
    base, request = phrase_model()
    assert len(base.encode(request.prompt, request.target_new).answer) == 150
    recall, both, _ = said(base, request, create(base, f"AnyEdit:window=5:{PLACE}"))
    assert recall >= 0.9
    assert both >= 0.9
    assert said(base, request, create(base, f"MEMIT:{PLACE}"))[0] < 0.5

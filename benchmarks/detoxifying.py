r"""Seconds of an edit of DINM, against a plain loop over complete passes.

    python benchmarks/detoxifying.py
    python benchmarks/detoxifying.py --model FOLDER --requests 8

Both write the same requests, with the default settings: a prompt of 60 words, a safe and an unsafe
reply of 20 words, and a constraint of 12, all from the packaged plain text.  The plain loop takes
one request at a time: it reads both replies in complete passes to locate the layer, then trains a
copy of its weight with Adam through complete passes with all logits, and puts the weight back.
DINM reads replies together, runs again only what lies above the layer, and trains requests of one
layer in one loop.  Times are those of the processor, the better of three; the cosine is that of
both changes, of the request where it is smallest.  ``kept`` counts weights that are bit-equal after
all edits.  A second line has the mean divergence along the constraints after the edits, with and
without their part of the loss, and how often it is lower with it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.methods import DINM
from kedit_lightning.statistics import few_sample_texts

REPEATS = 3
#: Words of a prompt, of either reply, and of question and answer of a constraint.
PROMPT, REPLY, QUESTION, ANSWER = 60, 20, 8, 4


def requests(count: int) -> list[EditRequest]:
    """Requests made of plain text."""
    words = " ".join(few_sample_texts()).split()
    size = PROMPT + 2 * REPLY + QUESTION + ANSWER
    found = []
    for start in range(0, count * size, size):
        rest = iter(words[start : start + size])
        prompt, safe, unsafe, question, answer = (
            " ".join(next(rest) for _ in range(n)) for n in (PROMPT, REPLY, REPLY, QUESTION, ANSWER)
        )
        kept = {"constraint_prompt": question, "constraint_answer": answer}
        found.append(EditRequest(prompt, safe, None, unsafe, **kept))
    return found


def plain_edit(method: DINM, request: EditRequest) -> tuple[int, Tensor]:
    """The layer and the change ``[d_out, d_in]`` of a Linear, by complete passes over one row."""
    base, settings = method.base, method.settings
    texts = [
        (request.prompt, request.target_new),
        (request.prompt, request.target_old),
        (method.with_suffix(request.prompt), request.target_new),
        method.constraint(request),
    ]
    rows = [base.encode(*text) for text in texts]
    inputs = [torch.tensor([[*row.prompt, *row.answer]], device=base.device) for row in rows]
    spans = [slice(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1) for row in rows]
    layers, states = sorted(method.projections), []
    blocks = [base.module(base.layout.block_name(layer)) for layer in layers]
    for ids, row in zip(inputs[:2], rows[:2], strict=True):
        seen: list[Tensor] = []

        def read(module: object, args: object, out: object, seen: list[Tensor] = seen) -> None:
            seen.append(out[0] if isinstance(out, tuple) else out)

        hooks = [block.register_forward_hook(read) for block in blocks]
        with torch.no_grad():
            base.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        states.append(torch.stack([out[0, len(row.prompt) :].mean(0) for out in seen]))
    layer = layers[int((states[0] - states[1]).norm(dim=-1).argmax())]
    weight = base.module(method.projections[layer]).weight
    before = weight.detach().clone()
    weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=settings.lr, fused=True)

    def log_probs(number: int) -> Tensor:
        logits = base.model(input_ids=inputs[number], use_cache=False).logits[0]
        return logits[spans[number]].log_softmax(-1)

    with torch.no_grad():
        known = log_probs(3)
    for _ in range(settings.steps):
        nll = cross_entropy(log_probs(2), inputs[2][0, len(rows[2].prompt) :])
        now = log_probs(3)
        kl = (now.exp() * (now - known)).sum(-1).mean()
        optimizer.zero_grad()
        (settings.edit_weight * nll + settings.constraint_weight * kl).backward()
        optimizer.step()
    change = weight.detach() - before
    weight.requires_grad_(False)
    weight.grad = None
    with torch.no_grad():
        weight.copy_(before)
    return layer, change


def best(run: Callable[[], object], count: int) -> float:
    """Seconds of processor time a request, the better of several runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds) / count


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    base = BaseModel.load(options.model)
    method = DINM(base_model=base)
    asked = requests(options.requests)
    weights = {name: weight.clone() for name, weight in base.model.named_parameters()}
    edits = list(method.edit_each([[request] for request in asked]))
    plain = [plain_edit(method, request) for request in asked]
    cosines = []
    for edit, (layer, change) in zip(edits, plain, strict=True):
        (delta,) = edit.deltas().values()
        assert edit.origin.notes["layer"] == layer
        cosines.append(float(cosine_similarity(delta.flatten(), change.flatten(), dim=0)))
    slow = best(lambda: [plain_edit(method, request) for request in asked], len(asked))
    alone = best(lambda: [method.edit([request]) for request in asked], len(asked))
    together = best(lambda: list(method.edit_each([[request] for request in asked])), len(asked))
    kept = sum(torch.equal(weights[name], weight) for name, weight in base.model.named_parameters())
    layers = sorted({layer for layer, _ in plain})
    print("| model | layers | plain, s/edit | one by one | together | ratio | cosine | kept |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {base.name} | {layers} | {slow:.4f} | {alone:.4f} | {together:.4f} "
        f"| {together / slow:.2f} | {min(cosines):.6f} | {kept} of {len(weights)} |"
    )
    without = DINM(base_model=base, constraint_weight=0.0)
    pairs = [
        tuple(edit.origin.notes["constraint_divergence"] for edit in both)
        for both in zip(edits, without.edit_each([[request] for request in asked]), strict=True)
    ]
    means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    lower = sum(one < other for one, other in pairs)
    print(
        f"divergence {means[0]:.4f} with the constraint, {means[1]:.4f} without, lower in "
        f"{lower} of {len(pairs)}"
    )


if __name__ == "__main__":
    main()

"""How fast the parts of closed-form editing are, against the way released code does them.

    python benchmarks/locate.py             all, a few minutes
    python benchmarks/locate.py --parts targets --vocabularies 3000

``targets``: a batch of requests whose values are found together, from cached states of the blocks
below and of the tokens before the subject, with logits only where they are read; against one
request at a time, with its contexts in one padded batch and complete forward passes.  Both run all
steps, and the values and answers of some requests of the batch are compared with those found
alone, in float64.

``solver``: an update with a factor that is kept, against a fresh decomposition of the whole system.

``statistics``: one pass for all layers (see key_statistics.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from key_statistics import SHAPES, build, median_seconds
from key_statistics import main as statistics
from torch import Tensor

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.base_models.taps import add_at, change_output
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings, one_layer
from kedit_lightning.methods.locate.shared.least_squares import covariance_prior, ridge_update
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.locate.shared.value_optimizer import ValueOptimizer
from kedit_lightning.methods.locate.shared.value_site import Site

CONTEXTS, STEPS, REQUESTS, REPEATS = 20, 20, 32, 5
#: Which of the requests are timed one at a time.
TIMED_ALONE = (0, 10, 20, 30)
SETTINGS = LocateSettings(steps=STEPS, clamp=4.0, weight_decay=1e-3, stop_loss=0.0)


def contexts() -> list[str]:
    """Texts of 5 and of 10 words to put before prompts; with none before, there is one more."""
    words = ["the", "city", "of", "a", "river", "in", "which", "she", "was", "born", "and", "he"]
    return [
        " ".join(words[(i + j) % len(words)] for j in range(5 if i < CONTEXTS // 2 else 10)) + ". "
        for i in range(CONTEXTS)
    ]


def one_at_a_time(base: BaseModel, site: Site, request: EditRequest, initial: Tensor) -> Tensor:
    """The value of one request, found as released code finds it. Shape ``[d_out]``."""
    prompts = [text + request.prompt for text in ("", *contexts())]
    subject = request.subject
    rows = base.rows(
        [*prompts, f"{subject} is a"],
        [*[request.target_new] * len(prompts), None],
        [subject] * (len(prompts) + 1),
    )
    (module,), size = site.modules, initial.norm()
    delta = torch.zeros_like(initial, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=SETTINGS.lr)
    reference: Tensor | None = None
    at = torch.arange(len(prompts))[:, None]
    for step in range(STEPS):
        with change_output(
            base.model,
            module,
            lambda y: add_at(y, rows.subject_end, delta.expand(len(y), -1)),
        ):
            logs = base.model(**rows.inputs, use_cache=False).logits.log_softmax(-1)
        essence = logs[-1, rows.subject_end[-1]]
        reference = essence.detach() if reference is None else reference
        ids = rows.answer_ids[:-1, :, None]
        chosen = logs[at, rows.answer_columns[:-1]].gather(-1, ids)[..., 0]
        mask = rows.answer_mask[:-1]
        nll = -((chosen * mask).sum(1) / mask.sum(1)).mean()
        kl = (essence.exp() * (essence - reference)).sum()
        loss = nll + SETTINGS.kl_factor * kl + SETTINGS.weight_decay * delta.norm() / size**2
        if step == STEPS - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        delta.grad.nan_to_num_()  # of a norm at 0
        adam.step()
        with torch.no_grad():
            limit = SETTINGS.clamp * size
            delta.mul_((limit / delta.norm().clamp(min=1e-30)).clamp(max=1))
    return delta.detach()


def answers(base: BaseModel, site: Site, request: EditRequest, delta: Tensor) -> Tensor:
    """Likeliest tokens where the answer stands, with a value in force."""
    rows = base.rows([request.prompt], [request.target_new], [request.subject])
    change = delta[None]
    with (
        torch.no_grad(),
        change_output(base.model, site.modules[0], lambda y: add_at(y, rows.subject_end, change)),
    ):
        return base.answer_logits(rows).argmax(-1)


def check_equal(
    base: BaseModel, site: Site, requests: Sequence[EditRequest], checked: Sequence[int]
) -> None:
    """Compare values and answers of a batch with those found alone, in float64."""
    initial = subject_states(base, site.modules, requests).outputs[site.modules[0]]
    together = ValueOptimizer(base, site, contexts(), SETTINGS).run(requests, initial)[:, 0]
    for i in checked:
        request, found = requests[i], together[i]
        alone = one_at_a_time(base, site, request, initial[i, 0])
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-8)
        assert torch.equal(answers(base, site, request, found), answers(base, site, request, alone))


def targets(kind: str, vocabulary: int, repeats: int, checked: int) -> tuple[float, float]:
    """Seconds an edit, one at a time and together."""
    facts = NanoFacts(limit=REQUESTS, seed=0).examples("train")
    requests = [example.requests[0] for example in facts]
    base = build(kind, vocabulary)
    layer = one_layer(base)[0]
    site = Site((base.layout.block(layer).down,), layer)
    base.model.double()
    check_equal(base, site, requests, range(0, REQUESTS, REQUESTS // checked))
    base.model.float()
    initial = subject_states(base, site.modules, requests).outputs[site.modules[0]]
    optimizer = ValueOptimizer(base, site, contexts(), SETTINGS)

    def alone() -> None:
        for i in TIMED_ALONE:
            one_at_a_time(base, site, requests[i], initial[i, 0])

    first, second = median_seconds([alone, lambda: optimizer.run(requests, initial)], repeats)
    return first / len(TIMED_ALONE), second / len(requests)


def solver(width: int = 4096, count: int = 100, repeats: int = REPEATS) -> tuple[float, float]:
    """Seconds of a fresh decomposition and of an update with a kept factor, both in float64."""
    torch.manual_seed(0)
    x = torch.randn(width, 2 * width, dtype=torch.float64)
    moment = x @ x.T / (2 * width)
    keys = torch.randn(width, count, dtype=torch.float64)
    residuals = torch.randn(256, count, dtype=torch.float64)
    prior = covariance_prior(torch.linalg.cholesky(moment), 100.0)

    def fresh() -> Tensor:
        system = 100.0 * moment + keys @ keys.T
        return torch.linalg.solve(system, keys @ residuals.T).T

    def kept() -> Tensor:
        a, b = ridge_update(keys, residuals, prior, 1.0)
        return b @ a

    torch.testing.assert_close(kept(), fresh())
    first, second = median_seconds([fresh, kept], repeats)
    return first, second


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ("targets", "solver", "statistics")
    parser.add_argument("--parts", nargs="+", default=known, choices=known)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[3000, 50_000])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument(
        "--checked", type=int, default=8, help="how many of the 32 requests are compared"
    )
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, float32, median of {args.repeats}\n")
    if "targets" in args.parts:
        print(f"{'model':6} {'vocabulary':>10} {'alone s':>8} {'of 32 s':>8} {'ratio':>6}")
        for vocabulary in args.vocabularies:
            for kind in SHAPES:
                alone, together = targets(kind, vocabulary, args.repeats, args.checked)
                ratio = alone / together
                print(
                    f"{kind:6} {vocabulary:10} {alone:8.3f} {together:8.3f} {ratio:6.2f}",
                    flush=True,
                )
    if "solver" in args.parts:
        fresh, kept = solver(repeats=args.repeats)
        print(
            f"\nsolver: fresh {fresh:.2f} s, kept factor {kept:.3f} s, ratio {fresh / kept:.1f}\n"
        )
    if "statistics" in args.parts:
        statistics(args.repeats)


if __name__ == "__main__":
    main()

"""Arithmetic of the metrics on tokens, against loops in NumPy and Python."""

import math

import numpy as np
import pytest
import torch

from kedit_lightning.metrics.functional import (
    exact_match,
    kl_divergence,
    mean_log_prob,
    prefers,
    token_match,
    total_log_prob,
    unchanged_text,
    unchanged_top1,
)


@pytest.fixture
def rows():
    """Ids of 40 rows of up to 6 tokens, a few wrong, the mask as ragged as answers are."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(9, (40, 6), generator=generator)
    wrong = torch.rand(40, 6, generator=generator) < 0.2
    predicted = torch.where(wrong, target + 1, target)
    lengths = torch.randint(1, 7, (40, 1), generator=generator)
    mask = torch.arange(6) < lengths
    return predicted, target, mask


def ragged(values, mask):
    return [row[keep] for row, keep in zip(values.numpy(), mask.numpy(), strict=True)]


def test_token_and_exact_match_agree_with_a_loop(rows):
    predicted, target, mask = rows
    shares = [
        np.mean(said == wanted)
        for said, wanted in zip(ragged(predicted, mask), ragged(target, mask), strict=True)
    ]
    assert 0.2 < np.mean([share == 1 for share in shares]) < 0.9  # the fixture has both
    np.testing.assert_allclose(token_match(predicted, target, mask), shares, rtol=1e-6)
    assert exact_match(predicted, target, mask).tolist() == [share == 1 for share in shares]
    assert unchanged_top1(predicted, target, mask).tolist() == [share == 1 for share in shares]


def test_a_mask_of_integers_is_a_mask(rows):
    predicted, target, mask = rows
    for score in (token_match, exact_match, unchanged_top1):
        assert torch.equal(
            score(predicted, target, mask), score(predicted, target, mask.to(torch.int64))
        )


def test_rows_without_answer_tokens_never_succeed():
    ids, nothing = torch.tensor([[4, 4]]), torch.tensor([[False, False]])
    assert math.isnan(token_match(ids, ids, nothing).item())
    assert exact_match(ids, ids, nothing).tolist() == [False]
    assert math.isnan(mean_log_prob(torch.zeros(1, 2), nothing).item())
    assert math.isnan(kl_divergence(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), nothing).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_log_probs_pool_only_answer_tokens(dtype):
    log_probs = -torch.rand(8, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    mask = torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5], [1], [2]])
    log_probs = log_probs.masked_fill(~mask, -math.inf)  # padding may hold anything
    expected = [row.astype(np.float64) for row in ragged(log_probs.double(), mask)]
    mean, total = mean_log_prob(log_probs, mask), total_log_prob(log_probs, mask)
    assert mean.dtype == total.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(mean, [row.mean() for row in expected], rtol=1e-6)
    np.testing.assert_allclose(total, [row.sum() for row in expected], rtol=1e-6)


def test_preference_depends_on_how_tokens_are_pooled():
    # "new" has three likely tokens, "old" one: longer answers lose by total, win by mean.
    new, old = torch.tensor([[-0.5, -0.5, -0.5]]), torch.tensor([[-0.9, -7.0]])
    one = torch.tensor([[True, False]])
    assert prefers(new, old, old_mask=one).item()
    assert not prefers(new, old, old_mask=one, reduction="total").item()
    assert not prefers(new, new).item()
    with pytest.raises(ValueError, match="equally many rows"):
        prefers(new, torch.zeros(2, 3))


def reference_kl(base, edited, mask):
    base, edited = base.double().numpy(), edited.double().numpy()
    values = []
    for row in range(base.shape[0]):
        positions = []
        for place in np.flatnonzero(mask[row].numpy()):
            p, log_p, log_q = np.exp(base[row, place]), base[row, place], edited[row, place]
            positions.append(sum(p[i] * (log_p[i] - log_q[i]) for i in range(len(p)) if p[i] > 0))
        values.append(np.mean(positions))
    return values


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.bfloat16, 1e-4), (torch.float32, 1e-4), (torch.float64, 1e-12)]
)
def test_kl_agrees_with_a_loop_and_is_exactly_zero_on_itself(dtype, rtol):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 4, 5, 50, generator=generator, dtype=torch.float64)
    base, edited = torch.log_softmax(logits, dim=-1).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    edited[~mask] = math.nan  # positions outside the mask may hold anything
    found = kl_divergence(base, edited, mask)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found, reference_kl(base, edited, mask), rtol=rtol)
    assert (found > 0.1).all()
    assert kl_divergence(base, base, mask).tolist() == [0.0] * 4


def test_kl_has_a_direction_and_follows_ruled_out_tokens():
    base = torch.tensor([[[1.0, 0.0]]]).log()
    spread = torch.tensor([[[0.5, 0.5]]]).log()
    mask = torch.tensor([[True]])
    assert kl_divergence(base, spread, mask).item() == pytest.approx(math.log(2))
    assert kl_divergence(spread, base, mask).item() == math.inf
    assert kl_divergence(base, base, mask).item() == 0.0


def test_text_is_compared_as_it_stands():
    assert unchanged_text("Paris", "Paris")
    assert not unchanged_text("Paris", "Paris ")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: token_match(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3)), "target"),
        (lambda: exact_match(torch.zeros(3), torch.zeros(3), torch.ones(3)), "predicted"),
        (lambda: mean_log_prob(torch.zeros(2, 3), torch.ones(2)), "mask"),
        (lambda: unchanged_top1(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)), "mask"),
        (lambda: kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)), "vocab"),
        (lambda: kl_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2)), "mask"),
    ],
)
def test_wrong_shapes_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()

"""Key statistics: accumulation, factors, the cache, and ``fit``."""

from __future__ import annotations

import json

import pytest
import torch
from support import TEXT, tiny_base

from kedit_lightning import EditTrainer
from kedit_lightning.base_models.taps import capture
from kedit_lightning.data import Texts
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import (
    KeyCollector,
    SecondMoment,
    estimate_from_few_samples,
    factorise,
    find_statistics,
    save_to_cache,
    shrunk,
)


def modules_of(base):
    return [block.down for block in base.layout.blocks]


def test_moments_add_up_and_merge():
    keys = torch.randn(50, 6)
    whole = SecondMoment.empty(6).updated(keys)
    parts = (
        SecondMoment.empty(6).updated(keys[:20]).merged(SecondMoment.empty(6).updated(keys[20:]))
    )
    torch.testing.assert_close(whole.mean, keys.double().T @ keys.double() / 50)
    torch.testing.assert_close(parts.total, whole.total)
    assert parts.count == whole.count == 50
    assert whole.total.dtype == torch.float64


def test_small_samples_are_pulled_towards_the_identity():
    few = SecondMoment.empty(8).updated(torch.randn(3, 8))
    assert torch.linalg.matrix_rank(few.mean) == 3
    eigenvalues = torch.linalg.eigvalsh(shrunk(few))
    assert eigenvalues.min() > 0.1 * eigenvalues.mean()
    many = SecondMoment.empty(8).updated(torch.randn(80_000, 8))
    torch.testing.assert_close(shrunk(many), many.mean, rtol=1e-3, atol=1e-3)


def test_factor_needs_no_ridge_when_it_can_do_without():
    x = torch.randn(6, 40, dtype=torch.float64)
    matrix = x @ x.T
    factor = factorise(matrix, "layer")
    torch.testing.assert_close(factor @ factor.T, matrix)
    singular = torch.outer(x[:, 0], x[:, 0])
    ridged = factorise(singular, "layer")
    torch.testing.assert_close(ridged @ ridged.T, singular, rtol=0, atol=1e-5 * singular.max())
    with pytest.raises(NonFiniteError, match="layer 'mlp'"):
        factorise(torch.full((2, 2), float("nan")), "mlp")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_pass_collects_every_layer_and_no_padding(family, side):
    base = tiny_base(family)
    base.padding_side = side
    collector = KeyCollector(base, modules_of(base))
    collector.read(TEXT)
    for name in modules_of(base):
        expected = 0.0
        for text in TEXT:
            rows = base.rows([text])
            with torch.no_grad(), capture(base.model, [name]) as seen:
                base.forward(rows)
            keys = seen.inputs[name][0]
            expected = expected + keys.T @ keys
        torch.testing.assert_close(collector.moments[name].total, expected)
    assert collector.tokens == sum(base.encoder.count(text) for text in TEXT)


def test_long_texts_are_cut():
    base = tiny_base("llama")
    collector = KeyCollector(base, modules_of(base), max_tokens=5)
    collector.read([TEXT[0]])
    assert collector.tokens == 5


def test_cache_finds_the_largest_collection_of_this_model_only():
    base, other = tiny_base("llama"), tiny_base("llama", torch.float32)
    for texts in (TEXT[:1], TEXT):
        collector = KeyCollector(base, modules_of(base))
        collector.read(texts)
        save_to_cache(base, collector, "corpus" + str(len(texts)))
    found = find_statistics(base, modules_of(base)[1])
    assert found is not None
    assert found.corpus == "corpus4"
    assert found.moment.count == collector.tokens
    torch.testing.assert_close(
        found.moment.mean, collector.moments[modules_of(base)[1]].mean, rtol=1e-6, atol=1e-9
    )
    assert find_statistics(other, modules_of(base)[1]) is None
    assert find_statistics(base, "no.such.module") is None


def test_few_sample_estimate_covers_all_layers():
    base = tiny_base("llama")
    estimate_from_few_samples(base)
    found = [find_statistics(base, name) for name in modules_of(base)]
    assert all(statistics is not None and statistics.is_few_sample for statistics in found)


def test_fit_collects_what_edits_then_use(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("\n".join(TEXT[:2]))
    (tmp_path / "corpus" / "b.jsonl").write_text(json.dumps({"text": TEXT[2]}))
    base = tiny_base("llama")
    rome = ROME(base, contexts=2, steps=3)
    trainer = EditTrainer(
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    trainer.fit(rome, Texts(tmp_path / "corpus", batch_size=1))
    assert "key statistics of" in capsys.readouterr().out
    found = find_statistics(base, modules_of(base)[0])
    assert found is not None
    assert not found.is_few_sample
    again = ROME(base, statistics="required", contexts=2, steps=3)
    again.configure_model()
    torch.testing.assert_close(
        again.factor(again.module), factorise(found_mean(base, again.module), again.module)
    )
    assert str(found.moment.count) in again.statistics_note


def found_mean(base, module):
    found = find_statistics(base, module)
    assert found is not None
    return found.moment.mean


def test_fit_on_requests_says_what_is_needed(tmp_path):
    from kedit_lightning.data import NanoFacts

    rome = ROME(tiny_base("llama"))
    trainer = EditTrainer(
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    with pytest.raises(UnsupportedUseError, match="plain text"):
        trainer.fit(rome, NanoFacts(limit=2))

"""Key statistics: accumulation, factors, the cache, and ``fit``."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import REQUESTS, TEXT, tiny_base

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.base_models.taps import capture
from kedit_lightning.data import Texts
from kedit_lightning.errors import DataFileError, NonFiniteError, UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import (
    KeyCollector,
    chosen_statistics,
    estimate_from_few_samples,
    factorise,
    find_statistics,
    save_to_cache,
    shrunk,
)
from kedit_lightning.statistics import covariance_cache as store
from kedit_lightning.statistics import key_sums as sums
from kedit_lightning.statistics.key_collector import split_tokens
from kedit_lightning.statistics.key_sums import KeySums
from kedit_lightning.statistics.moment_file import KIND
from kedit_lightning.statistics.sealed_file import SealedFile, write_sealed


def modules_of(base):
    return [block.down for block in base.layout.blocks]


def moment_of(keys, lengths=None):
    """The second moment of keys, and its error bar, summed as a pass over text does."""
    lengths = lengths or [len(keys)]
    sums = KeySums(keys.shape[1], torch.device("cpu"))
    sums.add(keys, lengths)
    return sums.moment(torch.tensor([len(keys), sum(n * n for n in lengths), len(lengths)]))


@pytest.mark.parametrize("width", [6, 300])  # one block of columns, and several of unequal width
def test_sums_over_blocks_and_chunks_are_those_of_all_keys(width, monkeypatch):
    monkeypatch.setattr(sums, "CHUNK", 32)
    keys = torch.randn(50, width, dtype=torch.float64)
    mean = moment_of(keys).mean
    torch.testing.assert_close(mean, keys.T @ keys / 50)
    torch.testing.assert_close(mean, mean.T, rtol=0, atol=0)
    assert mean.dtype == torch.float64


def test_float32_keys_are_summed_to_a_millionth():
    # a mean far from zero and columns of very unequal size, as MLPs have
    scale = torch.logspace(-3, 3, 256)
    keys = (torch.randn(20_000, 256) + 0.5) * scale
    exact = keys.double().T @ keys.double() / len(keys)
    found = moment_of(keys).mean
    assert (found - exact).norm() / exact.norm() < 1e-6
    relative = (found - exact) / (scale[:, None] * scale).double()
    assert relative.abs().max() < 1e-6


def test_small_samples_are_pulled_towards_the_identity():
    few = moment_of(torch.randn(3, 8, dtype=torch.float64))
    assert torch.linalg.matrix_rank(few.mean) == 3
    eigenvalues = torch.linalg.eigvalsh(shrunk(few))
    assert eigenvalues.min() > 0.1 * eigenvalues.mean()
    many = moment_of(torch.randn(80_000, 8))
    torch.testing.assert_close(shrunk(many), many.mean, rtol=1e-3, atol=1e-3)


def draw_texts(texts, generator):
    """Keys of texts of unequal length with a shift of their own, so that keys are dependent."""
    lengths = torch.randint(5, 40, (texts,), generator=generator).tolist()
    shifts = torch.randn(texts, 24, generator=generator, dtype=torch.float64)
    noise = torch.randn(sum(lengths), 24, generator=generator, dtype=torch.float64)
    return noise + shifts.repeat_interleave(torch.tensor(lengths), 0), lengths


def test_error_bar_covers_the_real_error_and_shrinks_with_tokens():
    generator = torch.Generator().manual_seed(3)
    exact = 2 * torch.eye(24, dtype=torch.float64)  # noise and shifts have unit variance each
    stated = {}
    for texts in (50, 800):
        pairs = []
        for _ in range(40):
            moment = moment_of(*draw_texts(texts, generator))
            assert moment.error is not None
            pairs.append((float((moment.mean - exact).norm() / exact.norm()), moment.error))
        real = sum(real**2 for real, _ in pairs) ** 0.5 / len(pairs) ** 0.5
        stated[texts] = sum(bar for _, bar in pairs) / len(pairs)
        assert stated[texts] == pytest.approx(real, rel=0.15)
        assert sum(real < 2 * bar for real, bar in pairs) >= 38
    assert stated[800] == pytest.approx(stated[50] / 4, rel=0.15)


def test_one_text_has_no_error_bar():
    assert moment_of(torch.randn(10, 4)).error is None


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
        torch.testing.assert_close(collector.moments[name].mean * collector.tokens, expected)
    assert collector.tokens == sum(base.encoder.count(text) for text in TEXT)


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KIND])


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (9, [[1, 5, 6, 7, 8, 9]]),
        (6, [[1, 5, 6, 7, 8, 9]]),
        (5, [[1, 5, 6, 7], [1, 8, 9]]),
        (3, [[1, 5, 6], [1, 7, 8], [1, 9]]),
        (2, [[1, i] for i in range(5, 10)]),
        (1, [[i] for i in (1, 5, 6, 7, 8, 9)]),
    ],
)
def test_rows_of_a_text_hold_all_of_its_tokens(length, rows):
    found = split_tokens((1, 5, 6, 7, 8, 9), (1,), length)
    assert [list(row) for row in found] == rows
    assert split_tokens((1,), (1,), length) == [(1,)]
    assert split_tokens((5, 6), (), 1) == [(5,), (6,)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_token_of_a_long_text_is_used(family):
    """The rows of a text count as one text in the error bar."""
    base, length = tiny_base(family), 9
    collector = collected(base, TEXT, length)
    prefix = base.encoder.prefix
    texts = [split_tokens(base.encode(text).prompt, prefix, length) for text in TEXT]
    assert max(len(row) for rows in texts for row in rows) <= length
    whole = sum(base.encoder.count(text) - len(prefix) for text in TEXT)
    extra = len(prefix) * sum(map(len, texts))
    assert collector.tokens == whole + extra > 4 * 2 * length
    assert collector.texts == 4
    for name in modules_of(base):
        keys = []
        for rows in texts:
            with torch.no_grad(), capture(base.model, [name]) as seen:
                parts = []
                for row in rows:
                    base.model(torch.tensor([row]))
                    parts.append(seen.inputs[name][0])
            keys.append(torch.cat(parts))
        expected = moment_of(torch.cat(keys), [len(part) for part in keys])
        found = collector.moments[name]
        torch.testing.assert_close(found.mean, expected.mean)
        assert found.error == pytest.approx(expected.error)


def test_a_text_may_take_more_rows_than_a_pass():
    base = tiny_base("llama")
    texts = [TEXT[0], " ".join(TEXT), TEXT[1]]
    together, apart = collected(base, texts, 16), KeyCollector(base, modules_of(base), 16)
    for text in reversed(texts):
        apart.read([text])
    assert together.tokens == apart.tokens > 128
    for name, moment in together.moments.items():
        torch.testing.assert_close(moment.mean, apart.moments[name].mean)
        assert moment.error == pytest.approx(apart.moments[name].error)


def collected(base, texts, max_tokens=512):
    collector = KeyCollector(base, modules_of(base), max_tokens)
    collector.read(texts)
    return collector


def test_cache_finds_the_largest_collection_of_this_model_only():
    base, other = tiny_base("llama"), tiny_base("llama", torch.float32)
    module = modules_of(base)[1]
    for texts in (TEXT[:1], TEXT):
        collector = collected(base, texts)
        path = save_to_cache(collector, f"corpus{len(texts)}")
    found = find_statistics(base, module)
    assert found is not None
    assert found.path == path
    assert found.provenance.source == "corpus4"
    assert found.moment.count == collector.tokens
    assert found.moment.error == collector.moments[module].error is not None
    torch.testing.assert_close(
        found.moment.mean, collector.moments[module].mean, rtol=1e-6, atol=1e-9
    )
    assert find_statistics(other, module) is None
    assert find_statistics(base, "no.such.module") is None


def test_what_files_depend_on_is_in_their_name_and_header():
    base = tiny_base("llama")
    paths = {
        save_to_cache(collected(base, texts, cut), "text")
        for texts, cut in ((TEXT[:2], 512), (TEXT[:2], 50), (TEXT[2:], 512))
    }
    assert len(paths) == 3
    assert save_to_cache(collected(base, TEXT[1::-1]), "again") in paths  # order does not matter
    (path,) = {path for path in paths if "-split-50-" in path.name}
    header = header_of(path)
    assert header["fingerprints"] == [base.fingerprint]
    assert header["tokenizer"] == base.tokenizer_fingerprint
    assert (header["max_tokens"], header["texts"], header["split"]) == (50, 2, True)
    (tokens,) = set(header["counts"].values())
    assert header["dtype"] == "float64"
    assert path.name == (
        f"{base.fingerprint}-{base.tokenizer_fingerprint}-{header['corpus'][:16]}"
        f"-{tokens}-tokens-split-50-float64.safetensors"
    )


def rewritten(path, **change):
    """The file with another header, sealed anew."""
    file = SealedFile(path, KIND)
    return write_sealed(path, KIND, {**file.values, **change}, file.tensors())


@pytest.mark.parametrize("change", [{"fingerprints": ["0"]}, {"tokenizer": "0"}])
def test_foreign_files_are_not_taken(change):
    """The header decides, whatever a file is called."""
    base = tiny_base("llama")
    rewritten(save_to_cache(collected(base, TEXT), "text"), **change)
    assert find_statistics(base, modules_of(base)[0]) is None


def test_statistics_of_an_earlier_release_are_found():
    """They have no hashes, and their longer texts were cut."""
    base = tiny_base("llama")
    collector = collected(base, TEXT)
    path = save_to_cache(collector, "text")
    file = SealedFile(path, KIND)
    header = {n: v for n, v in file.values.items() if n not in ("texts", "split")}
    metadata = {KIND: json.dumps({**header, "format_version": 1})}
    save_file(file.tensors(), path, metadata=metadata)
    for name, moment in collector.moments.items():
        found = find_statistics(base, name)
        assert found is not None
        assert (found.moment.count, found.moment.error) == (moment.count, moment.error)
        assert torch.equal(found.moment.mean, moment.mean.float().double())
        assert not found.provenance.split


def test_collected_statistics_go_before_an_estimate_with_more_tokens():
    base = tiny_base("llama")
    estimate_from_few_samples(base)
    save_to_cache(collected(base, TEXT[:1]), "text")
    found = find_statistics(base, modules_of(base)[0])
    assert found is not None
    assert not found.is_few_sample


def test_keys_that_are_not_finite_are_not_kept():
    base = tiny_base("llama")
    collector = collected(base, TEXT)
    collector.state()[f"products.{modules_of(base)[2]}"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.2\.mlp"):
        save_to_cache(collector, "text")
    assert find_statistics(base, modules_of(base)[0]) is None


def test_a_chat_model_reads_plain_text_as_it_is():
    base = tiny_base("llama")
    plain = collected(base, TEXT).moments
    base.tokenizer.chat_template = "{{ messages[0].content }} and more"
    try:
        chat = BaseModel(base.model, base.tokenizer, chat=True)
        found = collected(chat, TEXT).moments
    finally:
        base.tokenizer.chat_template = None
    for name, moment in plain.items():
        torch.testing.assert_close(found[name].mean, moment.mean)


def test_few_sample_estimate_covers_all_layers_and_says_how_good_it_is():
    base = tiny_base("llama")
    estimate_from_few_samples(base)
    for name in modules_of(base):
        found = find_statistics(base, name)
        assert found is not None
        assert found.is_few_sample
        assert found.moment.error is not None
        assert f"± {100 * found.moment.error:.2g} %" in found.note


def test_few_sample_estimate_stops_when_it_is_good_enough(monkeypatch):
    base = tiny_base("llama")
    counts = {}
    for error in (1e-9, 0.2, 0.4):
        monkeypatch.setattr(store, "ENOUGH_ERROR", error)
        counts[error] = header_of(estimate_from_few_samples(base, batch_size=1))
    tokens = {error: max(header["counts"].values()) for error, header in counts.items()}
    assert tokens[1e-9] == collected(base, store.few_sample_texts()).tokens  # all of the text
    assert tokens[0.4] <= tokens[0.2] < tokens[1e-9]
    assert tokens[0.4] >= 10 * 48  # never fewer than 10 tokens a dimension
    assert max(counts[0.2]["errors"].values()) <= 0.2


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
        again.covariances.cholesky(again.edited[0]),
        factorise(found_mean(base, again.edited[0]), again.edited[0]),
    )
    assert str(found.moment.count) in again.covariances.note


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


# ---- statistics by path


def test_statistics_by_path():
    base, module = tiny_base("llama"), modules_of(tiny_base("llama"))[1]
    small = save_to_cache(collected(base, TEXT[:1]), "small")
    save_to_cache(collected(base, TEXT), "large")
    assert found_mean(base, module) is not None
    for path, source in ((small, "small"), (small.parent, "large")):
        method = ROME(base, contexts=0, steps=1, layer=1, statistics=str(path))
        assert method.edit(REQUESTS[:1]).origin.notes["statistics"].startswith(source)
    other = tiny_base("llama", torch.float32)
    with pytest.warns(UserWarning, match="were collected with another base model"):
        assert chosen_statistics(other, module, small).provenance.source == "small"


def test_paths_of_statistics_that_are_refused(tmp_path):
    base, module = tiny_base("llama"), modules_of(tiny_base("llama"))[1]
    with pytest.raises(UnsupportedUseError, match="statistics is 'requierd', which is neither"):
        ROME(base, statistics="requierd").edit(REQUESTS[:1])
    path = save_to_cache(collected(base, TEXT), "text")
    with pytest.raises(DataFileError, match=r"no key statistics of layer 'lm_head' \(it has model"):
        chosen_statistics(base, "lm_head", path)
    with pytest.raises(DataFileError, match="none at all"):
        chosen_statistics(base, module, tmp_path)
    wide = tiny_base("llama", intermediate_size=64)
    with (
        pytest.warns(UserWarning, match="another base model"),
        pytest.raises(DataFileError, match="no second moment of keys of width 64"),
    ):
        chosen_statistics(wide, module, path)
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(DataFileError, match="import it once with `python -m"):
        chosen_statistics(base, module, tmp_path / "a.npz")


def test_a_fit_is_one_pass_without_a_word_about_epochs(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXT))
    trainer = EditTrainer(
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    epochs = []

    class See(ROME):
        def on_train_epoch_start(self):
            epochs.append((self.trainer.current_epoch, self.trainer.max_epochs))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(See(tiny_base("llama")), Texts(tmp_path))
    assert epochs == [(0, 1)]
    assert not [w for w in told if "max_epochs" in str(w.message)]
    assert trainer.max_epochs is None

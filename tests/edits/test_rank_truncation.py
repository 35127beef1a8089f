"""Changes cut off at a rank: the best ones of that rank, exact where the rank allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import edit_kinds
import pytest
import torch
from edit_kinds import raw_logits
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.edits import DenseEdit, Edit, LowRankEdit, load_adapter, save_adapter, truncate
from kedit_lightning.edits.effects import WeightDelta
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.rank_truncation import truncated
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.runs.model_export import check_export, export_edits, logit_error

DOWN = "model.layers.1.mlp.down_proj"


def random_factors(rank: int, d_in: int = 9, d_out: int = 7) -> LowRankDelta:
    torch.manual_seed(0)
    return LowRankDelta(torch.randn(rank, d_in).double(), torch.randn(d_out, rank).double())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_what_is_kept_are_the_largest_singular_values(rank: int) -> None:
    low = random_factors(5)
    values = torch.linalg.svdvals(low.dense)
    for change in (WeightDelta(low), WeightDelta(None, low.dense), WeightDelta(low, low.dense)):
        found, lost = truncated(change, rank)
        matrix = change.matrix()
        assert matrix is not None
        assert found.rank <= rank
        expected = float(values[rank:].norm() / values.norm())
        share = float((matrix - found.dense).norm() / matrix.norm())
        assert share == pytest.approx(expected, abs=1e-12)
        assert lost == pytest.approx(expected, abs=1e-12)


def test_a_rank_that_is_not_needed_is_not_written() -> None:
    low = random_factors(3)
    twice = LowRankDelta.sum([low, low])  # of rank 3, in factors of rank 6
    found, lost = truncated(WeightDelta(twice), 4)
    assert (found.rank, lost) == (3, pytest.approx(0.0, abs=1e-12))
    torch.testing.assert_close(found.dense, twice.dense)
    found, lost = truncated(WeightDelta(None, torch.zeros(7, 9)), 4)
    assert not found.dense.any()
    assert lost == 0.0


def test_a_dense_edit_becomes_an_adapter(tmp_path: Path) -> None:
    base = tiny_base("llama")
    edits = [
        edit_kinds.low_rank(base),
        DenseEdit(base, {DOWN: (random_factors(40, 48, 32).dense, None)}),
    ]
    expected = logits_under(base, edits)
    save_adapter(base, edits, tmp_path / "whole", rank=64)
    save_adapter(base, edits, tmp_path / "cut", rank=2)
    whole = logits_under(base, [load_adapter(base, tmp_path / "whole")])
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    cut = load_adapter(base, tmp_path / "cut")
    assert max(delta.rank for delta in cut.factors.values()) == 2
    assert (logits_under(base, [cut]) - expected).abs().max() > 1e-3 * expected.abs().max()


def logits_under(base: BaseModel, edits: Sequence[Edit]) -> torch.Tensor:
    with base.edits.restored():
        for edit in edits:
            edit.apply()
        return raw_logits(base.model)


def test_the_error_of_logits_is_the_one_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base("llama")
    origin = EditOrigin(requests=tuple(REQUESTS[:2]))
    low = random_factors(6, 48, 32)
    edit = LowRankEdit(base, {DOWN: (low.a, low.b)}, origin)
    cut = truncate(base, [edit], 2)
    error = logit_error(base, [edit], [cut.edit])
    seen = []
    for request in origin.requests:
        row = base.encode(request.prompt, request.target_new)
        ids = torch.tensor([[*row.prompt, *row.answer]])
        with edit:
            exact = base.model(ids).logits
        with cut.edit:
            seen.append((base.model(ids).logits - exact).abs())
    assert error.largest == pytest.approx(max(float(part.max()) for part in seen), rel=1e-5)
    assert error.mean == pytest.approx(
        sum(float(part.sum()) for part in seen) / sum(part.numel() for part in seen), rel=1e-5
    )
    assert error.facts == 2
    assert not logit_error(base, [edit], [edit]).largest
    assert not base.edits.ids
    export_edits(base, [edit], tmp_path, "adapter", 2)
    said = capsys.readouterr().out
    assert f"'{DOWN}' lacks {cut.lost[DOWN]:.1%} of its change" in " ".join(said.split())
    assert f"{error.largest:.3g} at most" in " ".join(said.split())
    export_edits(base, [edit], tmp_path, "adapter", 8)
    assert "the adapter is exact" in capsys.readouterr().out


def test_the_error_of_logits_of_an_encoder_decoder_is_that_of_its_answers() -> None:
    base = tiny_base("t5")
    request = EditRequest(REQUESTS[0].prompt, "i")  # one token
    row = base.encode(request.prompt, request.target_new)
    ids = torch.tensor([[*row.prompt, *base.encoder.suffix]])
    answer = torch.tensor([[base.model.config.decoder_start_token_id, *row.answer[:-1]]])
    name, origin = "decoder.block.2.layer.2.DenseReluDense.wo", EditOrigin(requests=(request,))
    ones = torch.ones(1, base.module(name).in_features).double()  # what it reads is positive
    wanted = base.model.get_output_embeddings().weight[row.answer[0]][:, None]
    edits = [LowRankEdit(base, {name: (ones, 1e3 * sign * wanted)}, origin) for sign in (1, -1)]
    seen = []
    for edit in edits:
        with edit:
            seen.append(base.model(input_ids=ids, decoder_input_ids=answer).logits[0])
    held = [bool((logits.argmax(-1) == torch.tensor(row.answer)).all()) for logits in seen]
    assert held == [True, False]
    error = logit_error(base, edits[:1], edits[1:])
    assert error.largest == pytest.approx(float((seen[0] - seen[1]).abs().max()), rel=1e-5)
    assert error.changed == 1


def test_what_no_adapter_holds_is_refused(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    name = base.layout.block(1).down
    biased = DenseEdit(base, {name: (None, torch.ones(32))})
    with pytest.raises(UnsupportedUseError, match="bias of transformer"):
        truncate(base, [biased], 4)
    with pytest.raises(UnsupportedUseError, match="must be 1 or more"):
        truncate(base, [edit_kinds.low_rank(base)], 0)
    for rank in (None, 2):
        with pytest.raises(UnsupportedUseError, match="no edit changes a weight"):
            export_edits(base, [], tmp_path, "adapter", rank)
    with pytest.raises(UnsupportedUseError, match="keep it as a file"):
        truncate(base, [edit_kinds.KINDS["prompt"](base)], 4)


class Dense:
    """A method whose edits are no products."""

    weights, adapter = True, False


def test_ranks_go_with_adapters_and_dense_edits_with_ranks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedUseError, match="cut off at a rank"):
        check_export("adapter", Dense(), tmp_path)
    check_export("adapter", Dense(), tmp_path, 8)
    check_export("model", Dense(), tmp_path)
    for export in ("model", None):
        with pytest.raises(UnsupportedUseError, match="add --export adapter"):
            check_export(export, Dense(), tmp_path, 8)

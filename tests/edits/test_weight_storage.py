"""Weights that lie elsewhere between calls are read, edited and written as plain ones are."""

from __future__ import annotations

import pytest
import torch
from edit_kinds import dense, low_rank
from held_models import offloaded_to_disk, offloaded_to_memory, spread
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import DenseEdit, EditOrigin
from kedit_lightning.edits.projections import is_projection
from kedit_lightning.edits.weight_storage import device_of, matrix_of, rows_of, stored_tensors
from kedit_lightning.errors import NonFiniteError, UnsupportedUseError
from kedit_lightning.methods import FTM, GRACE, ROME

HELD = ("memory", "disk", "spread")


def held(how: str, folder) -> BaseModel:
    model = tiny_model("llama", torch.float32)
    if how == "memory":
        model = offloaded_to_memory(model)
    elif how == "disk":
        model = offloaded_to_disk(model, folder)
    else:
        model = spread(model, "model.layers", folder)
    return BaseModel(model, tiny_tokenizer(True), name="llama")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 30]])).logits


@pytest.fixture(scope="module")
def plain():
    return tiny_base("llama", torch.float32)


@pytest.mark.parametrize("how", HELD)
def test_an_offloaded_model_is_the_same_model(how, plain, tmp_path):
    base = held(how, tmp_path)
    assert base.fingerprint == plain.fingerprint
    assert base.full_fingerprint == plain.full_fingerprint
    assert base.device == torch.device("cpu")
    base.check_finite()
    down = base.layout.block(1).down
    assert base.module(down).weight.is_meta
    assert torch.equal(matrix_of(base.module(down)), plain.module(down).weight)
    head = base.model.get_output_embeddings()
    index = torch.tensor([3, 7])
    assert torch.equal(rows_of(head, index), plain.model.lm_head.weight[index])
    names = [name for name, _ in stored_tensors(base.model)]
    assert names == sorted(plain.model.state_dict())


def test_a_number_that_is_not_finite_is_found_on_disk(tmp_path):
    model = tiny_model("llama", torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = torch.nan
    base = BaseModel(offloaded_to_disk(model, tmp_path), tiny_tokenizer(True))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        base.check_finite()


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("kind", [low_rank, dense])
def test_an_edit_is_written_into_offloaded_weights(how, kind, plain, tmp_path):
    base = held(how, tmp_path)
    before = logits(base.model)
    assert torch.equal(before, logits(plain.model))
    edit, same = kind(base), kind(plain)
    edit.save(tmp_path / "edit")
    with Edit.load(tmp_path / "edit", base), same:
        assert torch.equal(logits(base.model), logits(plain.model))
    assert torch.equal(logits(base.model), before)
    written, wanted = edit.materialise(), same.materialise()
    assert not torch.equal(logits(wanted), before)
    assert torch.equal(logits(written), logits(wanted))
    assert torch.equal(logits(base.model), before)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.filterwarnings("ignore:the weights in")
def test_what_is_saved_of_an_offloaded_model_holds_the_edit(plain, tmp_path):
    base = held("spread", tmp_path / "offload")
    edit, wanted = low_rank(base), low_rank(plain).materialise()
    edit.materialise().save_pretrained(tmp_path / "copy")
    with edit:
        base.model.save_pretrained(tmp_path / "applied")
    for name in ("copy", "applied"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert torch.equal(logits(saved), logits(wanted))


def test_tied_weights_are_refused_though_they_are_on_disk(tmp_path):
    model = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    base = BaseModel(offloaded_to_disk(model, tmp_path), tiny_tokenizer(True))
    delta = torch.zeros(384, 32)
    with pytest.raises(UnsupportedUseError, match=r"'lm_head' is tied to 'model\.embed_tokens'"):
        DenseEdit(base, {"lm_head": (delta, None)}, EditOrigin())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (FTM, {"steps": 3}),
        (ROME, {"statistics": "identity", "contexts": 2, "steps": 3}),
        (GRACE, {"steps": 3, "radius": 1e-2}),
    ],
)
def test_methods_edit_an_offloaded_model_as_the_plain_one(method, settings, plain, tmp_path):
    base = held("disk", tmp_path)
    edit = method(base_model=base, **settings).edit(REQUESTS[:1])
    same = method(base_model=plain, **settings).edit(REQUESTS[:1])
    for name, tensor in edit.state()[0].items():
        torch.testing.assert_close(tensor, same.state()[0][name])


def test_what_maps_by_one_matrix_is_a_projection():
    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6

    assert is_projection(Packed())
    assert not is_projection(torch.nn.Bilinear(2, 3, 4))
    assert not is_projection(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    assert device_of(Packed()) == torch.device("cpu")


def test_the_matrix_of_unpacked_weights_is_a_copy():
    # compressed-tensors unpacks weights in the first pass, and leaves its scheme at the module.
    module = torch.nn.Linear(3, 2)
    module.quantization_scheme = object()
    before = module.weight.detach().clone()
    matrix_of(module).zero_()
    assert module.weight.equal(before)

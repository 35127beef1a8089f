"""One identity for weights in every precision, and what is bound to it."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import transformers
from edit_kinds import low_rank
from support import tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit
from kedit_lightning.base_models.source_checkpoint import packaged_fingerprint
from kedit_lightning.base_models.spec import resolve
from kedit_lightning.errors import BaseModelMismatchError
from kedit_lightning.methods import MEND
from kedit_lightning.statistics import estimate_from_few_samples, find_statistics

DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", torch.float32).save_pretrained(path)
    tiny_tokenizer(True).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_same_in_every_precision(folder, dtype):
    base, single = BaseModel.load(folder, dtype=dtype), BaseModel.load(folder, dtype="float32")
    assert base.weights_fingerprint == single.weights_fingerprint != single.fingerprint
    assert (base.fingerprint == single.fingerprint) == (dtype == "float32")


def test_a_copy_of_the_folder_is_the_same_and_a_user_may_have_loaded_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    base = BaseModel(model, tiny_tokenizer(True))
    assert base.weights_fingerprint == BaseModel.load(folder).weights_fingerprint


def test_shards_are_read_through_their_index(folder, tmp_path):
    BaseModel.load(folder).model.save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer(True).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shards, whole = BaseModel.load(tmp_path), BaseModel.load(folder)
    assert shards.weights_fingerprint == whole.weights_fingerprint


def test_weights_that_have_changed_since_are_others(folder):
    base = BaseModel.load(folder, dtype="bfloat16")
    before = base.weights_fingerprint
    weight = base.model.model.layers[2].mlp.down_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] += 0.5
    assert base.weights_fingerprint == base.fingerprint != before
    weight.data.copy_(kept)
    assert base.weights_fingerprint == before


def test_another_configuration_is_another_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rms_norm_eps = 1e-2
    config.save_pretrained(tmp_path / "other")
    other = BaseModel.load(tmp_path / "other")
    assert other.weights_fingerprint != BaseModel.load(folder).weights_fingerprint


def test_a_model_without_a_checkpoint_is_known_by_its_weights_alone():
    base = BaseModel(tiny_model("llama"), tiny_tokenizer(True))
    assert base.weights_fingerprint == base.fingerprint


def test_edits_stay_bound_to_the_weights_as_they_are_stored(folder, tmp_path):
    path = low_rank(BaseModel.load(folder, dtype="float32")).save(tmp_path / "edit")
    with pytest.raises(BaseModelMismatchError, match="in the same dtype"):
        Edit.load(path, BaseModel.load(folder, dtype="bfloat16"))


def test_statistics_serve_the_same_weights_in_another_precision(folder):
    single, half = (BaseModel.load(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    path = estimate_from_few_samples(single)
    layer = half.layout.block(1).down
    found = find_statistics(half, layer)
    assert found is not None and found.path == path  # noqa: PT018
    assert found.provenance.dtype == "float32"
    other = BaseModel(tiny_model("llama", torch.bfloat16), tiny_tokenizer(True))
    assert find_statistics(other, layer) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_packaged_network_serves_nano_in_half_precision(dtype):
    base = BaseModel.load("nano", dtype=dtype)
    assert base.weights_fingerprint == packaged_fingerprint("nano")
    method = MEND(base_model=base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.configure_model()
        method.prepare_edit([])
    assert int(method.network.updates) > 0


def test_a_copy_of_nano_has_its_statistics(tmp_path):
    shutil.copytree(resolve("nano"), tmp_path / "nano")
    base = BaseModel.load(tmp_path / "nano", dtype="bfloat16")
    found = find_statistics(base, base.layout.block(2).down)
    assert found is not None and not found.is_few_sample  # noqa: PT018


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_are_those_of_their_checkpoint(quantization, folder):
    nano = BaseModel.load("nano", quantization=quantization)
    assert nano.weights_fingerprint == packaged_fingerprint("nano")
    found = find_statistics(nano, nano.layout.block_name(2) + ".mlp.down_proj")
    assert found is not None and not found.is_few_sample  # noqa: PT018
    other = tiny_model("llama", torch.float32)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.normal_()
    changed = folder.parent / f"changed-{quantization}"
    other.save_pretrained(changed)
    tiny_tokenizer(True).save_pretrained(changed)
    base = BaseModel.load(changed, quantization=quantization)
    base.model.config._name_or_path = str(folder)
    assert base.weights_fingerprint == base.fingerprint

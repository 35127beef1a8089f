"""The base model ``facts-30m`` and its facts: where they are looked for, and what they are."""

from __future__ import annotations

import shutil

import pytest
import torch
from places import ROOT, SAMPLES

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.base_models.spec import own_at_hand, resolve
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cache_folder import facts_30m_dir
from kedit_lightning.data import Facts30M
from kedit_lightning.errors import BaseModelNotFoundError, DataFileNotFoundError
from kedit_lightning.methods import ROME

NANO = ROOT / "src/kedit_lightning/base_models/nano"
HOW = "tools/facts_30m .* KEDIT_FACTS_30M"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder in place of the real one, with the files of ``nano``."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path)
    shutil.copy(SAMPLES / "nano_facts.jsonl", tmp_path / "test.jsonl")
    monkeypatch.setenv("KEDIT_FACTS_30M", str(tmp_path))
    return tmp_path


def test_it_lies_in_the_cache_unless_a_variable_names_it(monkeypatch, tmp_path):
    monkeypatch.delenv("KEDIT_FACTS_30M", raising=False)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    assert facts_30m_dir() == tmp_path / "facts-30m"
    assert "facts-30m" not in own_at_hand()


def test_where_it_is_absent_it_is_told_how_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("KEDIT_FACTS_30M", str(tmp_path / "none"))
    with pytest.raises(BaseModelNotFoundError, match=HOW):
        BaseModel.load("facts-30m")
    with pytest.raises(DataFileNotFoundError, match=HOW):
        Facts30M().examples()
    with pytest.raises(DataFileNotFoundError, match=HOW):
        Facts30M().examples("validation")


def test_where_it_is_made_it_is_loaded_in_32_bit(made):
    assert resolve("facts-30m") == str(made)
    assert "facts-30m" in own_at_hand()
    base = BaseModel.load("facts-30m")
    assert base.name == "facts-30m"
    assert base.model.dtype == torch.float32
    assert BaseModel.load("facts-30m", dtype="float16").model.dtype == torch.float16


def test_its_facts_stand_beside_it(made):
    examples = Facts30M().examples()
    assert {probe.group for example in examples for probe in example.probes} >= {"other_relation"}
    with pytest.raises(DataFileNotFoundError, match=HOW):
        Facts30M().examples("train")
    named = Facts30M(train_path=made / "test.jsonl").examples("train")
    assert [example.id for example in named] == [example.id for example in examples]


@pytest.mark.slow
def test_the_model_knows_its_facts_and_takes_edits():
    if "facts-30m" not in own_at_hand():
        pytest.skip("facts-30m has not been made on this machine (tools/facts_30m)")
    trainer = EditTrainer(protocol=Protocol(mode="single"), accelerator="cpu", logger=False,
                          enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    method = ROME(base_model="facts-30m")
    trainer.test(method, Facts30M(limit=20, seed=0), verbose=False)
    rows = {row.key: row for row in method.summary}
    assert rows["rewrite/tf_all"].mean >= 0.8
    assert method.base.model.config.model_type == "gpt2"

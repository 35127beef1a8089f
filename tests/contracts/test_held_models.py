"""Every way to hold a model, times methods of every kind: edits act as on the plain model."""

from __future__ import annotations

import pytest
import torch
from held_models import HELD, TWINS, hold, twin
from method_examples import LOCATE, POOL, make
from method_examples import METHODS as EXAMPLES
from support import REQUESTS, tiny_model, tiny_tokenizer
from torch import distributed
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits.weight_storage import quantisation
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.shared.losses import answer_nll

REQUEST = REQUESTS[0]
METHODS = {
    "FTM": {"lr": 1e-2, "steps": 5},
    "ROME": {**LOCATE, "steps": 10},
    "MEMIT": {**LOCATE, "steps": 10, "preserve": 1.0},
    "MEND": {"checkpoint": "none", "edit_lr": 1.0},
    "GRACE": {"radius": 1e-2, "steps": 10},
    "IKE": {"pool": POOL, "demonstrations": 1},
    "LoRA": {"lr": 1e-2, "steps": 10, "dropout": 0.0},
}
#: Cells of the fast tier: most ways to hold a model once, each method at least once.
FAST = {
    ("static cache", "GRACE"),
    ("in memory", "GRACE"),
    ("on disk", "ROME"),
    ("spread", "IKE"),
    ("8 bit", "FTM"),
    ("4 bit", "FTM"),
    ("torchao", "MEND"),
    ("torchao", "LoRA"),
    ("quanto", "FTM"),
    ("packed", "GRACE"),
    ("peft", "FTM"),
    ("tied", "MEMIT"),
}


@pytest.fixture(autouse=True)
def _no_process_group():
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


#: Peft has adapters for modules of the libraries that it knows.
FOREIGN = {("packed", "LoRA")}
#: torch compiles anew whenever the stack changes, which takes minutes, so two kinds of hook do.
COMPILED = {"FTM", "LoRA"}
CELLS = [
    pytest.param(how, method, marks=() if (how, method) in FAST else pytest.mark.slow)
    for how in HELD
    for method in METHODS
    if (how != "compiled" or method in COMPILED) and (how, method) not in FOREIGN
]
#: Methods whose memories are trained beside a projection.
MEMORIES = ("CaliNet", "DEFER", "MELO", "MEMOIR", "TPatcher", "WISE")


def log_probability(base: BaseModel) -> float:
    rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
    with torch.no_grad():
        nll = answer_nll(base.answer_logits(rows), rows.answer_ids, rows.answer_mask)
    return -float(nll[0])


def answers(base: BaseModel) -> tuple[float, str]:
    """Log-probability of the target, and the free answer."""
    return log_probability(base), base.generate([REQUEST.prompt], max_new_tokens=3)[0]


def lift(base: BaseModel, name: str, folder) -> float:
    """How much an edit lifts its target; it is rolled back and read from its file on the way."""
    before, identity = answers(base), (base.fingerprint, base.full_fingerprint)
    edit = make(name, METHODS[name], base).edit([REQUEST])
    with edit:
        during = answers(base)
    assert answers(base) == before
    assert during != before
    edit.save(folder / "edit.safetensors")
    with Edit.load(folder / "edit.safetensors", base):
        assert answers(base) == during
    assert answers(base) == before
    assert (base.fingerprint, base.full_fingerprint) == identity
    return during[0] - before[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("how", "name"), CELLS)
def test_an_edit_lifts_its_target_as_on_the_plain_model(how, name, tmp_path):
    plain = BaseModel(twin(how, tmp_path), tiny_tokenizer(True), name="plain")
    wanted = lift(plain, name, tmp_path)
    base = BaseModel(hold(how, tmp_path), tiny_tokenizer(True), name=how)
    found = lift(base, name, tmp_path)
    if how in TWINS:
        assert found == pytest.approx(wanted, abs=1e-3)
    elif name == "IKE":  # a tiny random model learns nothing from its context
        assert abs(found - wanted) < 1.0
    else:
        assert wanted > 0.3
        assert found > wanted / 2


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("how", ["packed", pytest.param("in memory", marks=pytest.mark.slow)])
def test_memories_stand_where_a_projection_computes(how, name, tmp_path):
    base = BaseModel(hold(how, tmp_path), tiny_tokenizer(True), name=how)
    with torch.no_grad():
        rows = base.rows([REQUEST.prompt], [REQUEST.target_new])
        before = base.answer_logits(rows)
        with make(name, dict(EXAMPLES)[name], base).edit([REQUEST]):
            assert not base.answer_logits(rows).equal(before)
        assert base.answer_logits(rows).equal(before)


def test_peft_knows_no_adapter_for_a_foreign_projection(tmp_path):
    base = BaseModel(hold("packed", tmp_path), tiny_tokenizer(True), name="packed")
    with pytest.raises(UnsupportedUseError, match=r"peft puts no adapter around.*PackedLinear"):
        make("LoRA", METHODS["LoRA"], base).edit([REQUEST])


QUANTISED = {
    "8 bit": "bitsandbytes, 8 bit",
    "4 bit": "bitsandbytes, 4 bit",
    "torchao": "torchao",
    "quanto": "quanto",
    "packed": "packed integers",
}


@pytest.mark.parametrize(("how", "kind"), QUANTISED.items())
def test_quantised_weights_are_written_dequantised_or_not_at_all(how, kind, tmp_path):
    base = BaseModel(hold(how, tmp_path), tiny_tokenizer(True), name="held")
    edit = make("FTM", METHODS["FTM"], base).edit([REQUEST])
    with pytest.raises(UnsupportedUseError, match=rf"'held' are quantised \({kind}\).*dequantise"):
        edit.materialise()
    with edit:
        with pytest.raises(UnsupportedUseError, match=rf"save_pretrained cannot.*\({kind}\)"):
            base.model.save_pretrained(tmp_path / "saved")
        wanted = log_probability(base)
    before = log_probability(base)
    copy = edit.materialise(dequantise=True)
    assert log_probability(base) == before
    copy.save_pretrained(tmp_path / "copy")
    tiny_tokenizer(True).save_pretrained(tmp_path / "copy")
    written = BaseModel.load(tmp_path / "copy")
    assert not getattr(written.model.config, "quantization_config", None)
    # 8 bits round inputs too, which the plain copy does not
    assert log_probability(written) == pytest.approx(wanted, abs=0.1 if how == "8 bit" else 1e-3)


def test_a_dequantised_copy_has_the_projections_of_its_architecture(tmp_path):
    tiny_model("gpt2", torch.float32, n_embd=64).save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    base = BaseModel(model, tiny_tokenizer(False), name="gpt2")
    down = base.layout.block(1).down
    assert quantisation(base.module(down)) == "bitsandbytes, 4 bit"
    edit = make("FTM", METHODS["FTM"], base).edit([REQUEST])
    with edit:
        wanted = log_probability(base)
    copy = BaseModel(edit.materialise(dequantise=True), tiny_tokenizer(False))
    assert type(copy.module(down)).__name__ == "Conv1D"
    assert log_probability(copy) == pytest.approx(wanted, abs=1e-3)

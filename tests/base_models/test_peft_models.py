"""Models that peft has wrapped: edited as the merged model is, under the names of the plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_examples import METHODS, make
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit
from kedit_lightning.edits import materialise
from kedit_lightning.errors import UnsupportedUseError

# peft asks for what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
SETTINGS = dict(METHODS)
#: A weight edit found by gradients, one in closed form, an adapter, a memory, a rewritten prompt;
#: and in the slow tests one of each other family.
EDITED = ("FTM", "ROME", "LoRA", "GRACE", "IKE")
OTHERS = ("AdaLoRA", "KN", "MALMEN", "MEMIT", "MEND", "SERAC", "TPatcher", "UltraEdit", "WISE")
#: Projections with a foreign adapter: those that are edited, and others.
ADAPTED = {"llama": ["down_proj", "up_proj", "q_proj"], "gpt2": ["c_fc", "mlp.c_proj", "c_attn"]}


def wrapped_model(kind: str, how: str, targets: list[str] | None = None, **options: Any) -> Any:
    """A model with a LoRA adapter that changes its answers, and what the user holds of it."""
    model = tiny_model(kind)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=targets or ADAPTED[kind],
        fan_in_fan_out=kind == "gpt2",
        init_lora_weights=False,
        lora_dropout=0.5,
        task_type="CAUSAL_LM",
        **options,
    )
    torch.manual_seed(3)
    if how == "add_adapter":
        model.add_adapter(config)
        return model
    return get_peft_model(model, config)


def base_of(model: Any) -> BaseModel:
    return BaseModel(model, tiny_tokenizer(bos=True), name="tiny")


def logits(base: BaseModel) -> torch.Tensor:
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    return base.answer_logits(rows)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
@pytest.mark.filterwarnings("ignore:UltraEdit has seen")
@pytest.mark.parametrize(
    "name", [*EDITED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_an_edit_equals_that_of_the_merged_model(name, how):
    kind = "gpt2" if name == "LoRA" else "llama"
    held = wrapped_model(kind, how)
    base = base_of(held)
    merged = base_of(wrapped_model(kind, "get_peft_model").merge_and_unload())
    before = logits(base)
    torch.testing.assert_close(before, logits(merged), rtol=0, atol=1e-9)
    edit = make(name, SETTINGS[name], base).edit(REQUESTS[:2])
    wanted = make(name, SETTINGS[name], merged).edit(REQUESTS[:2])
    with edit, wanted:
        assert not torch.equal(logits(base), before)
        torch.testing.assert_close(logits(base), logits(merged), rtol=0, atol=1e-7)
        asked = [request.prompt for request in REQUESTS]
        assert base.generate(asked, max_new_tokens=4) == merged.generate(asked, max_new_tokens=4)
    assert torch.equal(logits(base), before)
    again = Edit.load(edit.save("edit.safetensors"), base_of(wrapped_model(kind, how)))
    assert again.id == edit.id


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["FTM", "GRACE"])
def test_an_edit_survives_merging_the_adapter(name):
    held = wrapped_model("llama", "get_peft_model")
    held, base = copy.deepcopy((held, base_of(held)))  # merging changes the weights of a copy
    edit = make(name, SETTINGS[name], base).edit(REQUESTS[:2]).apply()
    rows = base.rows([r.prompt for r in REQUESTS])
    edited = base.forward(rows).logits
    assert torch.equal(held(**rows.inputs).logits, edited)  # what the user holds is edited, too
    assert held.merge_and_unload() is base.model
    if name == "FTM":
        torch.testing.assert_close(base.model(**rows.inputs).logits, edited, rtol=0, atol=1e-9)
    else:
        with pytest.warns(UserWarning, match="another module is now in the place of"):
            torch.testing.assert_close(base.forward(rows).logits, edited, rtol=0, atol=1e-9)
    edit.rollback()
    merged = base_of(wrapped_model("llama", "get_peft_model").merge_and_unload())
    assert torch.equal(logits(base), logits(merged))


def test_wrapping_an_edited_model_keeps_its_edits():
    base = copy.deepcopy(tiny_base("llama"))
    with make("FTM", SETTINGS["FTM"], base).edit(REQUESTS[:1]) as edit:
        edited = logits(base)
        held = get_peft_model(base.model, LoraConfig(r=2, target_modules=["down_proj"]))
        with pytest.warns(UserWarning, match="carries 1 edit"):
            again = base_of(held)
        assert again.edits is base.edits
        assert torch.equal(logits(again), edited)  # the new adapter is zero
        assert [e.id for e in again.edits] == [edit.id]


def test_names_and_fingerprint_are_those_of_the_plain_model_with_what_is_in_force():
    plain, held = tiny_base("llama"), wrapped_model("llama", "get_peft_model")
    held, base = copy.deepcopy((held, base_of(held)))
    other = base_of(wrapped_model("llama", "add_adapter"))
    assert base.layout.blocks == plain.layout.blocks == other.layout.blocks
    assert [base.layout.attention(i) for i in (0, 3)] == [plain.layout.attention(i) for i in (0, 3)]
    assert base.layout.is_gated == plain.layout.is_gated
    assert base.fingerprint == other.fingerprint != plain.fingerprint
    assert base.full_fingerprint == other.full_fingerprint != plain.full_fingerprint
    acting, full = base.fingerprint, base.full_fingerprint
    with held.disable_adapter():
        assert (base.fingerprint, base.full_fingerprint) == (
            plain.fingerprint,
            plain.full_fingerprint,
        )
        assert torch.equal(logits(base), logits(plain))
    assert (base.fingerprint, base.full_fingerprint) == (acting, full)
    for layer in base.model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(2.0)
    assert base.fingerprint != acting  # other answers, though no tensor has changed
    held.merge_adapter()
    merged = base.fingerprint
    assert merged not in (acting, plain.fingerprint)
    # The weights hold the adapter now, whether its layers are there or not.
    assert base_of(copy.deepcopy(held).unload()).fingerprint == merged


def test_a_copy_with_the_edit_in_its_weights_keeps_the_adapter():
    base = base_of(wrapped_model("llama", "get_peft_model"))
    edit = make("FTM", SETTINGS["FTM"], base).edit(REQUESTS[:1])
    with edit:
        edited = logits(base)
        with pytest.raises(UnsupportedUseError, match="merge them first"):
            base.model.save_pretrained("out")
    written = base_of(materialise(base, [edit]))
    torch.testing.assert_close(logits(written), edited, rtol=0, atol=1e-9)


def test_adapters_that_act_outside_of_the_model_are_refused():
    model = tiny_model("llama")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedUseError, match=r"'default' of type PROMPT_TUNING"):
        BaseModel(get_peft_model(model, prompts), tiny_tokenizer(bos=True))
    activated = wrapped_model("llama", "get_peft_model", alora_invocation_tokens=[5])
    with pytest.raises(UnsupportedUseError, match="behind invocation tokens"):
        BaseModel(activated, tiny_tokenizer(bos=True))


def test_a_wrapper_that_passes_edits_by_is_named():
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["down_proj"])
    held = get_peft_model(tiny_model("llama"), config)
    with pytest.warns(UserWarning, match=r"AdaLoRA adapter.*call base\.model instead"):
        base = BaseModel(held, tiny_tokenizer(bos=True))
    with make("FTM", SETTINGS["FTM"], base).edit(REQUESTS[:1]):  # its modules are edited
        rows = base.rows([REQUESTS[0].prompt])
        assert torch.equal(held(**rows.inputs).logits, base.model(**rows.inputs).logits)

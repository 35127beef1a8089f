"""Edits written into weights and adapters: the same model, whichever way it is reached."""

from __future__ import annotations

import json
import sys

import edit_kinds
import pytest
import torch
import transformers
from edit_kinds import KINDS, WEIGHT_KINDS, answers, raw_logits
from safetensors.torch import load_file
from support import FAMILIES, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel
from kedit_lightning.edits import (
    AdapterEdit,
    CompositeEdit,
    DenseEdit,
    LowRankEdit,
    folded_prefix,
    materialise,
    truncate,
)
from kedit_lightning.edits.export import load_adapter, save_adapter
from kedit_lightning.edits.forward_hooks import ModuleHook
from kedit_lightning.edits.projections import oriented, projection_shape
from kedit_lightning.errors import EditFileError, UnsupportedUseError
from kedit_lightning.runs.model_export import export_edits, logit_error

#: peft 0.21 asks transformers 5.23 by a name that is being retired.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

#: Largest difference of logits that are written into weights from those of hooks.
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def _base_of(model, family):
    return BaseModel(model, tiny_tokenizer(family != "gpt2"), name=family)


def _difference(base: BaseModel, edit) -> float:
    """Largest difference between logits of hooks and of weights, relative to the largest logit."""
    plain = raw_logits(base.model)
    with edit:
        hooks = raw_logits(base.model)
    assert not torch.equal(hooks, plain)
    weights = raw_logits(edit.materialise())
    return float((hooks - weights).abs().max() / hooks.abs().max())


# ---- deltas and weights


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_hooks_and_weights_give_the_same_model(family, kind, dtype):
    base = tiny_base(family, dtype)
    assert _difference(base, KINDS[kind](base)) < EXACT[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_difference_is_that_of_rounding(family):
    base = tiny_base(family, torch.bfloat16)
    for kind in WEIGHT_KINDS:
        difference = _difference(base, KINDS[kind](base))
        sys.stdout.write(f"{family} {kind}: {difference:.1e} of the largest logit\n")
        assert difference < 0.03


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_named_and_oriented_as_the_parameters(family, kind):
    base = tiny_base(family)
    edit = KINDS[kind](base)
    deltas = edit.deltas()
    parameters = dict(base.model.named_parameters())
    with edit:
        hooks = raw_logits(base.model)
    by_hand = tiny_model(family)
    with torch.no_grad():
        for name, delta in deltas.items():
            assert delta.shape == parameters[name].shape
            by_hand.get_parameter(name).add_(delta)
    torch.testing.assert_close(raw_logits(by_hand), hooks, rtol=0, atol=1e-10 * hooks.abs().max())


def test_a_square_conv1d_is_turned_by_its_type_not_by_its_shape():
    base = tiny_base("gpt2", n_inner=32)
    name = base.layout.block(1).down
    a, b = edit_kinds.factors(base, name)
    delta = LowRankEdit(base, {name: (a, b)}).deltas()[f"{name}.weight"]
    torch.testing.assert_close(delta, (b @ a).T)
    assert not torch.allclose(delta, b @ a)


def test_materialising_leaves_the_base_model_and_its_stack_alone():
    base = tiny_base("llama")
    before = raw_logits(base.model)
    with edit_kinds.dense(base):
        applied = raw_logits(base.model)
        edit = edit_kinds.low_rank(base)
        copy = edit.materialise()
        assert torch.equal(raw_logits(base.model), applied)
    assert torch.equal(raw_logits(base.model), before)
    # The copy holds its own edit only, and no hook of the stack.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copy.modules())
    base.model(torch.tensor([[5]]), output_hidden_states=True)  # transformers adds hooks of its own
    with edit_kinds.dense(base):
        copy = edit.materialise()
    assert len(copy(torch.tensor([[5]]), output_hidden_states=True).hidden_states) == 5
    with edit:
        torch.testing.assert_close(raw_logits(copy), raw_logits(base.model), rtol=0, atol=1e-9)


def test_several_edits_are_written_together_and_rounded_once():
    base = tiny_base("llama", torch.bfloat16)
    name = base.layout.block(1).down
    d_in, d_out = projection_shape(base.module(name))
    # Each is too small for bfloat16 to notice, together they are not.
    weight = base.module(name).weight.float()
    small = weight * 2**-10
    edits = [DenseEdit(base, {name: (small, None)}) for _ in range(64)]
    written = materialise(base, edits).get_submodule(name).weight
    assert torch.equal(written, (weight + 64 * small).bfloat16())
    assert not torch.equal(written, base.module(name).weight)
    assert (d_in, d_out) == (48, 32)
    written = CompositeEdit(base, edits).materialise().get_submodule(name).weight
    assert torch.equal(written, (weight + 64 * small).bfloat16())


def test_deltas_of_a_composite_are_the_sum():
    base = tiny_base("gpt2")
    members = [edit_kinds.low_rank(base), edit_kinds.dense(base), edit_kinds.low_rank(base, seed=9)]
    total = CompositeEdit(base, members).deltas()
    for name, delta in total.items():
        parts = [m.deltas()[name] for m in members if name in m.deltas()]
        torch.testing.assert_close(delta, sum(parts))


@pytest.mark.parametrize("kind", ["codebook", "prompt", "bonus", "composite"])
def test_edits_of_no_weights_say_so(kind):
    base = tiny_base("llama")
    edit = KINDS[kind](base)
    with pytest.raises(UnsupportedUseError, match=r"changes no weights.*edit\.save"):
        edit.deltas()
    with pytest.raises(UnsupportedUseError, match="changes no weights"):
        edit.materialise()


def test_weights_that_are_quantised_are_not_written():
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    base.model.is_quantized = True
    with pytest.raises(UnsupportedUseError, match=r"'llama' are quantised.*without quantization"):
        edit.materialise()


# ---- folding


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_many_low_rank_edits_fold_into_the_same_change(dtype, family, monkeypatch):
    monkeypatch.setattr(folded_prefix, "BLOCK", 100)  # so that hooks alone sum
    base = tiny_base(family, dtype)
    name = base.layout.block(1).down
    edits = [
        LowRankEdit(base, {name: edit_kinds.factors(base, name, seed=i)}) for i in range(0, 40, 2)
    ]
    folded_from = []
    logits = []
    original = ModuleHook.__init__

    def spy(self, *args):
        original(self, *args)
        folded_from.append(self.delta.low_rank is None)

    monkeypatch.setattr(ModuleHook, "__init__", spy)
    for edit in edits:
        edit.apply()
        logits.append(raw_logits(base.model))
    # d_in * d_out / (d_in + d_out) is the rank past which one matrix is cheaper.
    d_in, d_out = projection_shape(base.module(name))
    pays = [2 * (i + 1) * (d_in + d_out) > d_in * d_out for i in range(len(edits))]
    assert folded_from == pays
    assert any(pays)
    assert not all(pays)
    deltas = torch.zeros_like(base.module(name).weight)
    for edit, seen in zip(edits, logits, strict=True):
        deltas = deltas + edit.deltas()[f"{name}.weight"]
        whole = DenseEdit(base, {name: (oriented(deltas, base.module(name)), None)})
        wanted = raw_logits(whole.materialise())
        scale = wanted.abs().max()
        torch.testing.assert_close(seen / scale, wanted / scale, rtol=0, atol=EXACT[dtype])
    for edit, seen in zip(reversed(edits), reversed(logits), strict=True):
        assert torch.equal(raw_logits(base.model), seen), "the fold depends on what happened before"
        edit.rollback()


def test_dense_and_folded_edits_of_a_module_add_up():
    base = tiny_base("llama")
    name = base.layout.block(1).down
    edits = [edit_kinds.dense(base)]
    edits += [LowRankEdit(base, {name: edit_kinds.factors(base, name, 12, i)}) for i in (1, 2)]
    on_module = [x for edit in edits for x in edit.effects() if x.module == name]
    assert ModuleHook(base.module(name), on_module).delta.low_rank is None
    for edit in edits:
        edit.apply()
    hooks = raw_logits(base.model)
    base.edits.clear()
    weights = raw_logits(materialise(base, edits))
    torch.testing.assert_close(hooks, weights, rtol=0, atol=1e-10 * float(hooks.abs().max()))


def test_half_precision_factors_fold_without_losing_digits():
    base = tiny_base("llama", torch.float32)
    name = base.layout.block(1).down
    pairs = [edit_kinds.factors(base, name, rank=12, seed=i) for i in (1, 2)]
    halves = [(a.bfloat16(), b.bfloat16()) for a, b in pairs]
    with LowRankEdit(base, {name: halves[0]}), LowRankEdit(base, {name: halves[1]}):
        folded = raw_logits(base.model)
    wide = [LowRankEdit(base, {name: (a.float(), b.float())}) for a, b in halves]
    wanted = raw_logits(materialise(base, wide))
    torch.testing.assert_close(folded, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


# ---- full models


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_full_model_is_read_back_by_transformers(family, tmp_path):
    base = tiny_base(family, torch.float32)
    edit = edit_kinds.low_rank(base)
    with edit:
        hooks = raw_logits(base.model)
    edit.materialise().save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loader = (
        transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    )
    read = loader.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        raw_logits(read), hooks, rtol=0, atol=1e-5 * float(hooks.abs().max())
    )
    again = BaseModel.load(tmp_path)
    assert again.fingerprint != base.fingerprint
    torch.testing.assert_close(
        raw_logits(again.model), hooks, rtol=0, atol=1e-5 * float(hooks.abs().max())
    )


# ---- adapters


def ranks_in(folder):
    """The ranks of the factors in an adapter's file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}


@pytest.mark.parametrize("family", [*FAMILIES, "t5"])
def test_peft_loads_an_exported_adapter(family, tmp_path):
    base = tiny_base(family, torch.float32)
    # Ranks differ by module, and layer 1 is not layer 11.
    edits = [edit_kinds.low_rank(base), edit_kinds.adapter(base), edit_kinds.low_rank(base, seed=5)]
    for edit in edits:
        edit.apply()
    hooks = raw_logits(base.model)
    base.edits.clear()
    if family == "gpt2":
        with pytest.warns(UserWarning, match=r"Conv1D.*export the full model"):
            save_adapter(base, [CompositeEdit(base, edits[:2]), edits[2]], tmp_path)
    else:
        save_adapter(base, [CompositeEdit(base, edits[:2]), edits[2]], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(ranks_in(tmp_path)) == min(ranks_in(tmp_path))
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    from peft import PeftModel  # a second of its own, which collecting the tests can do without

    wrapped = PeftModel.from_pretrained(tiny_model(family, torch.float32), tmp_path).eval()
    seen = raw_logits(wrapped)
    torch.testing.assert_close(seen, hooks, rtol=0, atol=1e-5 * float(hooks.abs().max()))
    merged = raw_logits(wrapped.merge_and_unload())
    torch.testing.assert_close(merged, hooks, rtol=0, atol=1e-5 * float(hooks.abs().max()))
    read = load_adapter(base, tmp_path)
    with read:
        torch.testing.assert_close(
            raw_logits(base.model), hooks, rtol=0, atol=1e-5 * float(hooks.abs().max())
        )
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")


def test_only_low_rank_edits_become_adapters(tmp_path):
    base = tiny_base("llama")
    edit = CompositeEdit(base, [edit_kinds.low_rank(base), edit_kinds.dense(base)])
    with pytest.raises(UnsupportedUseError, match=r"kind 'dense'.*export the full model"):
        save_adapter(base, [edit], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _trained(family: str, folder, **options):
    """An adapter as peft itself trains and saves it."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family, torch.float32)
    wrapped = get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).eval()
    wrapped.save_pretrained(folder)
    return raw_logits(wrapped)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 2, "rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_fc": 12, "h.1.mlp.c_proj": 4}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_trained_with_peft_is_the_same_as_an_edit(options, tmp_path):
    targets = {"target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True}
    wanted = _trained("gpt2", tmp_path, **targets, **options)
    base = tiny_base("gpt2", torch.float32)
    edit = load_adapter(base, tmp_path)
    assert isinstance(edit, AdapterEdit)
    with edit:
        seen = raw_logits(base.model)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# peft takes a projection that lost all of its rank for a broken one
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adalora_adapter_trained_with_peft_is_the_same_as_an_edit(family, tmp_path):
    from peft import AdaLoraConfig, get_peft_model

    targets = ["c_attn", "mlp.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=2,
        lora_alpha=8,
        target_modules=targets,
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model(family, torch.float32), config).eval()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for step in (1, 2):
        with torch.no_grad():
            for tensor in trained:
                tensor.add_(torch.randn_like(tensor))
        raw_logits(wrapped)
        for tensor in trained:
            tensor.grad = torch.randn_like(tensor)
        wrapped.base_model.update_and_allocate(step)
    wanted = raw_logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    base = tiny_base(family, torch.float32)
    edit = load_adapter(base, tmp_path)
    adapted = sum("lora_E" in name for name, _ in wrapped.named_parameters())
    assert sum(delta.rank for delta in edit.factors.values()) == 2 * adapted
    assert len(edit.factors) < adapted  # the random importance leaves some without rank
    with edit:
        seen = raw_logits(base.model)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_edits_on_top_of_an_adapter_go_into_one_file_with_it(tmp_path):
    """The adapter is read as an edit; peft then adds both."""
    _trained("llama", tmp_path / "old", r=2, lora_alpha=8, target_modules=["down_proj", "v_proj"])
    base = tiny_base("llama", torch.float32)
    old = load_adapter(base, tmp_path / "old").apply()
    new = edit_kinds.low_rank(base).apply()
    wanted = raw_logits(base.model)
    save_adapter(base, [old, new], tmp_path / "new")
    base.edits.clear()
    from peft import PeftModel

    model = PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path / "new").eval()
    torch.testing.assert_close(
        raw_logits(model), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_adapters_that_do_more_than_add_are_refused(options, tmp_path):
    _trained("gpt_neox" if "bias" in options else "llama", tmp_path, r=2, **_target(options))
    base = tiny_base("gpt_neox" if "bias" in options else "llama", torch.float32)
    with pytest.raises(UnsupportedUseError, match="no plain LoRA"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["experts.down_proj"]),
        ("lora_bias", True),
        ("a_setting_of_tomorrow", {"scale": 2}),
        ("peft_type", "ADALORA"),
    ],
)
def test_settings_by_which_factors_mean_something_else_are_refused(setting, value, tmp_path):
    base = tiny_base("llama")
    save_adapter(base, [edit_kinds.low_rank(base)], tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, setting: value}))
    named = "type ADALORA" if setting == "peft_type" else f"'{setting}': "
    with pytest.raises(UnsupportedUseError, match=f"no plain LoRA.*{named}"):
        load_adapter(base, tmp_path)
    path.write_text(json.dumps({**config, "eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}))
    load_adapter(base, tmp_path)  # another start of the same factors
    path.write_text(json.dumps(config)[:40])
    with pytest.raises(EditFileError, match="is damaged"):
        load_adapter(base, tmp_path)


def _target(options):
    name = "dense_4h_to_h" if "bias" in options else "down_proj"
    return {**options, "target_modules": [name]}


def test_a_folder_without_adapter_is_refused(tmp_path):
    base = tiny_base("llama")
    with pytest.raises(EditFileError, match=r"no adapter.*adapter_config\.json"):
        load_adapter(base, tmp_path)
    save_adapter(base, [edit_kinds.low_rank(base)], tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(EditFileError, match=r"it has no adapter_model\.safetensors"):
        load_adapter(base, tmp_path)


def test_answers_of_an_edited_model_are_those_of_its_export():
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    with edit:
        hooks = answers(base)
        texts = base.generate(edit_kinds.PROMPTS, max_new_tokens=6)
    export = _base_of(edit.materialise(), "llama")
    torch.testing.assert_close(answers(export), hooks, rtol=0, atol=1e-9)
    assert export.generate(edit_kinds.PROMPTS, max_new_tokens=6) == texts


def test_one_edit_is_written_as_a_list_of_one_is(tmp_path):
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    one, several = (materialise(base, given).state_dict() for given in (edit, [edit]))
    assert all(torch.equal(one[name], several[name]) for name in several)
    for name, given in (("one", edit), ("several", (part for part in [edit]))):
        save_adapter(base, given, tmp_path / name)
        export_edits(base, given if name == "one" else [edit], tmp_path / name, "adapter", rank=1)
    for file in ("adapter_model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "several" / file).read_bytes()
    assert truncate(base, edit, 1).lost == truncate(base, [edit], 1).lost
    assert logit_error(base, edit, edit).changed == 0

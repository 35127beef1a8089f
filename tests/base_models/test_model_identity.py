"""Who a model is: its weights now, and the edits that it carries."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import edit_kinds
import peft
import pytest
import torch
from support import tiny_base, tiny_model

from kedit_lightning import BaseModel, Edit
from kedit_lightning.base_models.fingerprint import (
    ModelIdentity,
    checksum,
    full_fingerprint,
    model_fingerprint,
)
from kedit_lightning.errors import BaseModelMismatchError, UnsupportedUseError

PROMPTS = edit_kinds.PROMPTS[:2]
KINDS = ("low_rank", "codebook", "composite")


def _logits(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        return base.answer_logits(base.rows(PROMPTS, ["Lyon", "Italy"]))


# ---- weights


def _in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)


def _behind_torch(model):
    model.lm_head.weight.data.mul_(1.01)


def _another_tensor(model):
    model.lm_head.weight.data = model.lm_head.weight.data * 1.01


def _loaded(model):
    model.load_state_dict({n: t * 1.01 for n, t in model.state_dict().items()})


def _trained(model):
    weight = model.lm_head.weight.requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def _merged(model):
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


CHANGES = [
    _in_place,
    _behind_torch,
    _another_tensor,
    _loaded,
    _trained,
    _merged,
    torch.nn.Module.half,
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_fingerprints_are_those_of_the_weights_now(change):
    model = tiny_model("llama")
    identity = ModelIdentity(model)
    before = identity.fingerprint, identity.full_fingerprint
    assert (identity.fingerprint, identity.full_fingerprint) == before
    change(model)
    after = identity.fingerprint, identity.full_fingerprint
    assert after[0] != before[0]
    assert after[1] != before[1]
    assert after == (model_fingerprint(model), full_fingerprint(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_edit_at_hand_says_that_the_weights_are_others_now(change, tmp_path):
    base = copy.deepcopy(tiny_base("llama"))
    edit = edit_kinds.low_rank(base)
    edit.origin = dataclasses.replace(edit.origin, method="ROME", fingerprint=base.fingerprint)
    with edit:
        pass
    change(base.model)
    with pytest.warns(UserWarning, match="ROME was computed for other weights .* has now"):
        edit.apply()
    edit.rollback()
    forced = Edit.load(edit.save(tmp_path / "edit.safetensors"), base, force=True)
    with forced, warnings.catch_warnings():
        warnings.simplefilter("error")
        forced.rollback()
        forced.apply()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "new"])
def test_the_model_itself_follows_a_module_that_was_swapped(kind, copied):
    base = BaseModel(copy.deepcopy(tiny_model("llama")), tiny_base("llama").tokenizer)
    rows = base.rows(PROMPTS)
    clean = base.forward(rows).logits
    edit = getattr(edit_kinds, kind)(base).apply()
    edited = base.forward(rows).logits
    for name in filter(None, base.edits.modules):  # not the model itself
        owner, _, own = name.rpartition(".")
        parent, old = base.model.get_submodule(owner), base.model.get_submodule(name)
        if copied:
            setattr(parent, own, copy.deepcopy(old))  # with its hook
        elif isinstance(old, torch.nn.Linear):
            new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
            new.weight = old.weight
            setattr(parent, own, new)
    with pytest.warns(UserWarning, match="another module is now in the place of"):
        again = base.model(**rows.inputs).logits
    assert torch.equal(again, edited)
    edit.rollback()
    assert torch.equal(base.model(**rows.inputs).logits, clean)
    with edit_kinds.low_rank(base):  # no hook of the other edit came along with a copy
        assert len(base.edits) == 1
    assert not any(module._forward_hooks for module in base.model.modules())


def test_one_changed_value_changes_the_full_fingerprint_and_refuses_old_edits(tmp_path):
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    edit.origin = dataclasses.replace(edit.origin, full_fingerprint=base.full_fingerprint)
    path = edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(path, base).id == edit.id
    before = base.fingerprint
    weight = base.model.model.layers[1].mlp.down_proj.weight
    kept = weight.clone()
    with torch.no_grad():
        weight[3, 5] += 1
    assert base.fingerprint == before, "the sample misses it"
    with pytest.raises(BaseModelMismatchError, match=r"very weights of 'llama'.*force=True"):
        Edit.load(path, base)
    assert Edit.load(path, base, force=True).id == edit.id
    with torch.no_grad():
        weight.copy_(kept)
    assert Edit.load(path, base).id == edit.id


def test_weights_that_the_first_pass_rescales_are_known_before_it(tmp_path):
    settings = {"attention_hidden_size": 32, "rescale_every": 2, "context_length": 128}
    base = tiny_base("rwkv", **settings)
    before = base.fingerprint, base.full_fingerprint
    module = base.layout.block(2).down
    edit = edit_kinds.LowRankEdit(
        base,
        {module: edit_kinds.factors(base, module)},
        edit_kinds.origin_of(base, full_fingerprint=base.full_fingerprint),
    )
    path = edit.save(tmp_path / "edit.safetensors")
    with Edit.load(path, base):
        edited = _logits(base)
    clean = _logits(base)
    assert not torch.equal(clean, edited)
    assert (base.fingerprint, base.full_fingerprint) == before
    fresh, used = tiny_base("rwkv", **settings), tiny_base("rwkv", **settings)
    assert torch.equal(_logits(used), clean)  # a pass first, the fingerprint afterwards
    for other in (fresh, used):
        with Edit.load(path, other):
            assert torch.equal(_logits(other), edited)


def test_a_tokenizer_with_added_tokens_is_another_one():
    base = tiny_base("llama")
    before = base.tokenizer_fingerprint
    base.tokenizer = copy.deepcopy(base.tokenizer)
    assert base.tokenizer_fingerprint == before
    base.tokenizer.add_tokens(["<new>"])
    assert base.tokenizer_fingerprint != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_checksums_do_not_depend_on_how_a_tensor_lies_in_memory(dtype):
    tensor = (torch.randn(70, 41) * 50).to(dtype)
    assert checksum(tensor) == checksum(tensor.T.contiguous().T)
    shifted = torch.cat([torch.zeros(1, dtype=dtype), tensor.flatten()])[1:]
    assert checksum(tensor) == checksum(shifted)
    shifted[-1] += 1
    assert checksum(tensor) != checksum(shifted)


# ---- base models that share a model


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_base_model_and_a_copy_carry_the_same_edits(kind):
    base = tiny_base("llama")
    clean, fingerprint = _logits(base), base.fingerprint
    edit = edit_kinds.KINDS[kind](base).apply()
    edited = _logits(base)
    with pytest.warns(UserWarning, match=rf"carries 1 edit.*{edit.id}.*rolls them back"):
        second = BaseModel(base.model, base.tokenizer)
    with pytest.warns(UserWarning, match=rf"carries 1 edit.*{edit.id}"):
        twin = BaseModel(copy.deepcopy(base.model), base.tokenizer)
    copied = copy.deepcopy(base)
    for other in (second, twin, copied):
        assert other.edits.ids == (edit.id,)
        assert other.fingerprint == fingerprint
        assert torch.equal(_logits(other), edited)
        with other.edits.suspended():
            assert torch.equal(_logits(other), clean)
    twin.edits.clear()
    assert torch.equal(_logits(twin), clean)
    assert torch.equal(_logits(base), edited)
    copied.edits[0].rollback()
    assert torch.equal(_logits(copied), clean)
    assert torch.equal(_logits(base), edited)
    second.edits.clear()
    assert torch.equal(_logits(base), clean)
    assert not edit.applied
    assert len(base.edits) == 0


def test_base_models_on_one_model_see_edits_that_are_applied_later():
    base = tiny_base("llama")
    second = BaseModel(base.model, base.tokenizer)
    clean = _logits(base)
    with edit_kinds.low_rank(base) as edit:
        assert second.edits.ids == (edit.id,)
        with second.edits.suspended():
            assert torch.equal(_logits(second), clean)
    assert len(second.edits) == 0


def test_a_copy_of_an_edited_model_answers_as_it_did():
    base = tiny_base("llama")
    with edit_kinds.low_rank(base):
        edited = _logits(base)
        model = copy.deepcopy(base.model)
    inputs = base.rows(PROMPTS, ["Lyon", "Italy"]).inputs
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, base.model(**inputs).logits)
    with pytest.warns(UserWarning, match="carries 1 edit"):
        twin = BaseModel(model, base.tokenizer)
    assert torch.equal(_logits(twin), edited)
    twin.edits.clear()
    assert torch.equal(_logits(twin), _logits(base))


def test_a_model_with_a_part_of_an_edited_one_is_refused():
    base, other = tiny_base("llama"), tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    layers = other.model.model.layers
    own = layers[1]
    with edit:
        layers[1] = copy.deepcopy(base.model.model.layers[1])
        refused = (lambda: other.fingerprint, lambda: other.full_fingerprint)
        for refuse in (*refused, lambda: BaseModel(other.model, base.tokenizer)):
            with pytest.raises(UnsupportedUseError, match=rf"1 edit.*{edit.id}.*roll them back"):
                refuse()
    layers[1] = own
    assert other.fingerprint == base.fingerprint


def test_an_edited_model_is_not_pickled_and_a_clean_one_is():
    base = tiny_base("llama")
    with edit_kinds.codebook(base) as edit:
        for content in (base, base.model):
            with pytest.raises(UnsupportedUseError, match=rf"{edit.id}.*roll them back.*save"):
                pickle.dumps(content)
    again = pickle.loads(pickle.dumps(base))
    assert torch.equal(_logits(again), _logits(base))
    with edit_kinds.low_rank(again):
        assert not torch.equal(_logits(again), _logits(base))


@pytest.mark.parametrize("kind", [*KINDS, "adapter"])
def test_edits_follow_a_module_that_is_put_in_the_place_of_theirs(kind):
    base = tiny_base("llama")
    edit = edit_kinds.KINDS[kind](base)
    clean = _logits(base)
    with edit:
        edited, said = _logits(base), base.generate(PROMPTS, max_new_tokens=4)
        for answer, want in ((_logits, edited), (lambda b: b.generate(PROMPTS, 4), said)):
            for block in base.model.model.layers:
                block.mlp = copy.deepcopy(block.mlp)
                for module in block.mlp.modules():
                    module._forward_hooks.clear()
            with pytest.warns(UserWarning, match=rf"another module.*mlp.*{edit.id}.*act on it"):
                found = answer(base)
            assert torch.equal(found, want) if answer is _logits else found == want
            assert torch.equal(_logits(base), edited)
    assert torch.equal(_logits(base), clean)


# ---- save_pretrained, peft, compiled code


def test_save_pretrained_saves_the_edited_weights_and_says_so(tmp_path):
    base = tiny_base("llama")
    with edit_kinds.low_rank(base) as edit:
        edited = _logits(base)
        with pytest.warns(UserWarning, match="hold the 1 edit.*roll them back first"):
            base.model.save_pretrained(tmp_path)
        base.tokenizer.save_pretrained(tmp_path)
        again = BaseModel.load(tmp_path)
        torch.testing.assert_close(_logits(again), edited)
        with edit_kinds.codebook(base), pytest.raises(UnsupportedUseError, match="roll them back"):
            base.model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(base.model)
    assert not edit.applied
    base.model.save_pretrained(tmp_path)
    assert BaseModel.load(tmp_path).full_fingerprint == base.full_fingerprint


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize("before", [True, False])
def test_edits_stay_when_an_adapter_comes_and_goes(before):
    base = tiny_base("llama")
    edit = edit_kinds.low_rank(base)
    with edit:
        edited = _logits(base)
    clean = _logits(base)
    targets = [name.rpartition(".")[2] for name in edit.factors]
    if before:
        edit.apply()
    wrapped = peft.get_peft_model(base.model, peft.LoraConfig(r=2, target_modules=targets))
    edit.apply()
    torch.testing.assert_close(_logits(base), edited)  # a fresh adapter adds zeros
    assert edit.deltas().keys() == {f"{name}.weight" for name in edit.factors}
    wrapped.unload()
    assert torch.equal(_logits(base), edited)
    assert edit.applied
    edit.rollback()
    assert torch.equal(_logits(base), clean)


#: Run by itself, as pytest's record of what torch traces takes minutes.
_COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import edit_kinds
from support import tiny_base

base = tiny_base("llama", num_hidden_layers=3)
rows = base.rows(edit_kinds.PROMPTS[:2], ["Lyon", "Italy"])

def answers():
    with torch.no_grad():
        return base.answer_logits(rows)

clean = answers()
a, b = edit_kinds.low_rank(base), edit_kinds.codebook(base)
with a:
    a_plain = answers()
with b:
    b_plain = answers()
assert not torch.allclose(clean, a_plain)
assert not torch.allclose(clean, b_plain)
if sys.argv[2] == "model":
    base.model.compile(backend="eager")
else:  # a wrapper of somebody else, which nothing on the model shows
    base.model = torch.compile(base.model, backend="eager")
torch.testing.assert_close(answers(), clean)
with a:
    torch.testing.assert_close(answers(), a_plain)
    with base.edits.suspended():
        torch.testing.assert_close(answers(), clean)
torch.testing.assert_close(answers(), clean)
with a:
    torch.testing.assert_close(answers(), a_plain)
torch.testing.assert_close(answers(), clean)
with b:  # one that breaks the graph, after which blocks are compiled one by one
    torch.testing.assert_close(answers(), b_plain)
torch.testing.assert_close(answers(), clean)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["model", "wrapper"])
def test_edits_take_effect_in_compiled_models(how):
    tests = str(Path(edit_kinds.__file__).parent)
    subprocess.run([sys.executable, "-c", _COMPILED, tests, how], check=True)


def test_a_compiled_model_has_the_names_and_the_fingerprint_of_the_plain_one():
    model = tiny_model("llama")
    want = BaseModel(model, tiny_base("llama").tokenizer)
    with pytest.warns(UserWarning, match=r"base\.model\.compile"):
        base = BaseModel(torch.compile(model, backend="eager"), want.tokenizer)
    assert base.model is model
    assert base.edits is want.edits
    assert base.fingerprint == want.fingerprint


# ---- threads


def test_threads_take_turns_on_one_model():
    base = tiny_base("llama")
    edit = edit_kinds.codebook(base)
    rows = [
        base.rows([prompt], ["Lyon"]) for prompt in (*PROMPTS, "A", "Once upon a time there was")
    ]
    with torch.no_grad():
        clean = [base.answer_logits(row) for row in rows]
        with edit:
            edited = [base.answer_logits(row) for row in rows]
    errors: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                with torch.no_grad(), base.edits.lock:
                    with edit:
                        torch.testing.assert_close(base.answer_logits(rows[index]), edited[index])
                    torch.testing.assert_close(base.answer_logits(rows[index]), clean[index])
                with torch.no_grad(), base.edits.suspended():
                    torch.testing.assert_close(base.answer_logits(rows[index]), clean[index])
                base.generate(PROMPTS, max_new_tokens=2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(base.edits) == 0


def test_weights_that_are_held_are_looked_at_once():
    base = tiny_base("llama")
    weight = base.model.get_input_embeddings().weight
    before = weight.detach().clone()
    short, full = base.identity.fingerprints
    with base.identity.held():
        assert base.identity.fingerprint == short
        with torch.no_grad():
            weight += 1
        assert base.identity.fingerprints == (short, full)
        with base.identity.held():
            assert base.identity.full_fingerprint == full
    changed = base.identity.fingerprints
    assert changed[0] != short
    assert changed[1] != full
    with torch.no_grad():
        weight.copy_(before)

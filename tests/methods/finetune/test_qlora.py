"""QLoRA: LoRA on 4-bit weights, against LoRA on the same weights written out."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, BaseModelSpec, Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import LoRA, QLoRA

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
WIDE = {"hidden_size": 64, "intermediate_size": 128}
QUICK = {"lr": 1e-2, "steps": 5, "dropout": 0.0, "target_modules": ["v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose projections are large enough for blocks of 64 values."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", torch.float32, **WIDE).save_pretrained(path)
    tiny_tokenizer(bos=True).save_pretrained(path)
    return path


def logits(base):
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    return base.answer_logits(rows)


def quantised(base):
    """Copies of the 4-bit weights, by module."""
    modules = (m for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    return {module: module.weight.detach().clone() for module in modules}


def test_it_writes_facts_with_the_kernels_of_this_processor(folder):
    qlora = QLoRA(base_model=str(folder), **{**QUICK, "steps": 20, "dropout": 0.1})
    base, request = qlora.base, REQUESTS[0]
    rows = base.rows([request.prompt], [request.target_new])
    before, unlike = logits(base), base.answer_log_probs(rows).sum()
    with qlora.edit([request]):
        assert base.answer_log_probs(rows).sum() > unlike + 4
    assert torch.equal(logits(base), before)


def written_out(base):
    """The same model with its weights in full, as the 4-bit ones are read."""
    model = tiny_model("llama", torch.float32, **WIDE)
    with torch.no_grad():
        for name, module in base.model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                )
                model.get_submodule(name).weight.copy_(weight)
    return BaseModel(model, base.tokenizer, name="written out")


def test_it_equals_lora_on_the_same_weights_in_full(folder, tmp_path):
    qlora = QLoRA(base_model=str(folder), **QUICK)
    base = qlora.base
    state = quantised(base)
    assert all(module.weight.quant_state.quant_type == "nf4" for module in state)
    assert all(module.weight.quant_state.nested for module in state)  # constants, too
    before = logits(base)
    edit = qlora.edit(REQUESTS[:2])
    assert torch.equal(logits(base), before)
    assert all(torch.equal(module.weight, kept) for module, kept in state.items())
    plain = written_out(base)
    torch.testing.assert_close(logits(plain), before, rtol=0, atol=1e-4)
    wanted = LoRA(base_model=plain, **QUICK).edit(REQUESTS[:2])
    assert edit.factors.keys() == wanted.factors.keys()
    for name, delta in wanted.factors.items():
        assert edit.factors[name].b.dtype == torch.float32
        torch.testing.assert_close(edit.factors[name].dense, delta.dense, rtol=0, atol=2e-2)
    with edit, wanted:
        after = logits(base)
        assert (after - before).abs().max() > 0.5
        torch.testing.assert_close(after, logits(plain), rtol=0, atol=5e-2)
    assert torch.equal(logits(base), before)
    with Edit.load(edit.save(tmp_path / "edit.safetensors"), base):
        assert torch.equal(logits(base), after)


def test_other_weights_are_refused():
    with pytest.raises(UnsupportedUseError, match=r"'llama' are not; load it with quantization"):
        QLoRA(base_model=tiny_base("llama")).edit(REQUESTS[:1])
    with pytest.raises(UnsupportedUseError, match="is asked for in 8 bit"):
        QLoRA(base_model=BaseModelSpec("some/model", quantization="8bit")).edit(REQUESTS[:1])

"""LoRA on the routed experts of a mixture, trained by peft and detached as changes of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mixtures import mixture, routed_layer, tiny_mixture, tiny_model
from support import REQUESTS, tiny_base
from torch import Tensor

from kedit_lightning import BaseModel
from kedit_lightning.edits import AdapterEdit, Edit, save_adapter
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import AdaLoRA, LoRA
from kedit_lightning.methods.finetune.shared import adapter_method

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
DAILY = ("mixtral", "gpt_oss", "jetmoe", "llama4_text")
MORE = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "jamba")
KINDS = [*DAILY, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]


def lora_of(base: BaseModel, **settings: Any) -> LoRA:
    """LoRA on the experts of one block."""
    name = mixture(base, routed_layer(base)).fused_name
    usual = {"target_modules": [name], "rank": 2, "dropout": 0.0, "lr": 2e-2, "steps": 8}
    return LoRA(base, **{"batch_size": 2, "stop_loss": 0.0, **usual, **settings})


def logits(base: BaseModel) -> Tensor:
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with torch.no_grad():
        return base.answer_logits(rows)


def loss(base: BaseModel) -> float:
    rows = base.rows([r.prompt for r in REQUESTS[:2]], [r.target_new for r in REQUESTS[:2]])
    with torch.no_grad():
        return -float(base.answer_log_probs(rows).sum())


def tree(model: torch.nn.Module) -> list[Any]:
    """Modules and parameters, in order, as objects."""
    modules = [(n, id(m), type(m), sorted(vars(m))) for n, m in model.named_modules()]
    return [*modules, *((n, id(p), p.requires_grad) for n, p in model.named_parameters())]


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch, base: BaseModel, found: list[Tensor]) -> Iterator[None]:
    """Inside, the logits of the model that peft has trained are noted before it is put off."""
    training = adapter_method.adapter_training

    @contextmanager
    def watched(*args: Any) -> Iterator[Any]:
        with training(*args) as adapter:
            yield adapter
            found.append(logits(base))

    with monkeypatch.context() as patch:
        patch.setattr(adapter_method, "adapter_training", watched)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_edit_is_what_peft_trained(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, trained = tiny_mixture(kind), []
    before, nll, modules = logits(base), loss(base), tree(base.model)
    with noted(monkeypatch, base, trained):
        edit = lora_of(base).edit(REQUESTS[:2])
    assert tree(base.model) == modules
    assert torch.equal(logits(base), before)
    assert isinstance(edit, AdapterEdit)
    projection = mixture(base, routed_layer(base))
    assert set(edit.factors) <= {projection.name_of(e) for e in projection.numbers}
    with edit:
        torch.testing.assert_close(logits(base), trained[0], rtol=0, atol=1e-9)
        assert loss(base) < 0.9 * nll
    assert torch.equal(logits(base), before)
    loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"), base)
    with loaded:
        again = logits(base)
    torch.testing.assert_close(again, trained[0], rtol=0, atol=1e-9)
    save_adapter(base, [edit], tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "adapter")).eval()
    inputs = base.rows([REQUESTS[0].prompt], ["Rome"]).inputs
    with edit, torch.no_grad():
        wanted = base.model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, wanted, rtol=0, atol=1e-9)


def test_experts_and_attention_are_trained_together_on_top_of_edits() -> None:
    base = tiny_mixture("gpt_oss")
    first = lora_of(base).edit(REQUESTS[:1])
    names = ["q_proj", "experts.down_proj"]
    with first:
        below, nll = logits(base), loss(base)
        second = lora_of(base, target_modules=names, layers=[-1]).edit(REQUESTS[1:2])
        assert torch.equal(logits(base), below)
        with second:
            assert loss(base) < nll
    ends = {name.rpartition(".")[2] for name in second.factors}
    assert "q_proj" in ends
    assert any(end.isdecimal() for end in ends)
    assert all(f".{len(base.layout) - 1}." in name for name in second.factors)


def test_the_model_is_left_as_it_was_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_mixture("gpt_oss")
    modules, before = tree(base.model), logits(base)
    lora = lora_of(base)

    def fail(*_: Any) -> None:
        logits(base)  # so that peft has taken its parameter out once
        raise ZeroDivisionError

    monkeypatch.setattr(lora, "after_step", fail)
    with pytest.raises(ZeroDivisionError):
        lora.edit(REQUESTS[:2])
    assert tree(base.model) == modules
    assert torch.equal(logits(base), before)


def test_names_of_one_part_mean_no_experts() -> None:
    base = tiny_mixture("qwen2_moe")
    lora = lora_of(base, target_modules=["down_proj"])
    lora.configure_model()
    assert not any(name.endswith("experts.down_proj") for name in lora.modules_trained)
    with pytest.raises(UnsupportedUseError, match=r"theirs are called .*experts\.down_proj"):
        lora_of(base, target_modules=["experts.up"]).configure_model()
    with pytest.raises(UnsupportedUseError, match="fit no projection"):
        LoRA(tiny_base("llama"), target_modules=["experts.down_proj"]).configure_model()


def test_what_peft_cannot_train_is_refused() -> None:
    base = tiny_mixture("mixtral")
    with pytest.raises(UnsupportedUseError, match="has no dropout; set dropout to 0"):
        lora_of(base, dropout=0.1).configure_model()
    with pytest.raises(UnsupportedUseError, match="AdaLoRA has none; use LoRA"):
        AdaLoRA(base, target_modules=["experts.down_proj"]).configure_model()
    with pytest.raises(UnsupportedUseError, match=r"leave the change out.*FTM"):
        lora_of(tiny_mixture("dbrx")).configure_model()
    name = mixture(base, routed_layer(base)).fused_name
    config = peft.LoraConfig(target_modules=[], target_parameters=[name])
    wrapped = peft.get_peft_model(tiny_model("mixtral"), config)
    adapted = BaseModel(wrapped, base.tokenizer, name="adapted")
    with pytest.raises(UnsupportedUseError, match="stand around them already; merge these"):
        lora_of(adapted, target_modules=[name]).configure_model()

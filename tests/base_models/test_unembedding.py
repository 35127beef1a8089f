"""The final norm and the head, found by what flows from the last block to the logits."""

from __future__ import annotations

import pytest
import torch
from support import tiny_base, tiny_model
from tiny_decoders import tiny_decoder
from torch import nn
from transformers import AutoConfig, AutoModel

from kedit_lightning.base_models.layout import Layout
from kedit_lightning.edits.projections import first_tensor
from kedit_lightning.errors import ModuleNotLocatedError


def _logits(model: nn.Module, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model, and of its head on the norm of the last block's output."""
    hidden: list[torch.Tensor] = []
    block = model.get_submodule(layout.block_name(len(layout) - 1))
    handle = block.register_forward_hook(lambda m, args, out: hidden.append(first_tensor(out)))
    ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits = model(**inputs, use_cache=False).logits
    handle.remove()
    last = hidden[-1]
    if layout.final_norm is not None:
        last = model.get_submodule(layout.final_norm)(last)
    return logits, model.get_submodule(layout.head)(last)


@pytest.mark.parametrize(
    ("family", "norm", "head"),
    [
        ("gpt2", "transformer.ln_f", "lm_head"),
        ("llama", "model.norm", "lm_head"),
        ("gpt_neox", "gpt_neox.final_layer_norm", "lm_head"),
        ("opt", "model.decoder.final_layer_norm", "lm_head"),
    ],
)
@torch.no_grad()
def test_the_head_on_the_final_norm_gives_the_logits(family, norm, head):
    model = tiny_model(family)
    layout = Layout(model)
    assert (layout.final_norm, layout.head) == (norm, head)
    logits, found = _logits(model, layout)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("olmo", "model.norm"),  # a norm without weights
        ("minimax", "model.norm"),  # a norm of states that are normalised already
        ("openai-gpt", None),  # post-norm
        ("bert", "cls.predictions.transform"),
        ("gemma", "model.norm"),
        ("mamba", "backbone.norm_f"),
    ],
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_final_norms_of_unusual_decoders(family, norm):
    model = tiny_decoder(family)
    layout = Layout(model)
    assert layout.final_norm == norm
    logits, found = _logits(model, layout)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_encoder_decoder_has_those_of_its_decoder():
    model = tiny_model("t5")
    layout = Layout(model)
    assert (layout.final_norm, layout.head) == ("decoder.final_layer_norm", "lm_head")
    logits, found = _logits(model, layout)
    scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
    torch.testing.assert_close(scale * found, logits, rtol=0, atol=1e-10)
    with pytest.raises(ModuleNotLocatedError, match="encoder of an encoder-decoder has no head"):
        _ = layout.encoder.final_norm


def test_they_are_found_beneath_edits_and_leave_no_hook():
    base = tiny_base("llama")
    assert base.layout.final_norm == "model.norm"
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.filterwarnings("ignore")
def test_a_head_behind_more_than_a_norm_is_refused_with_both_names():
    layout = Layout(tiny_decoder("roberta"))
    with pytest.raises(ModuleNotLocatedError, match=r"'roberta' leads from its last block .* head"):
        _ = layout.final_norm


def test_a_model_without_a_head_says_so():
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModuleNotLocatedError, match="'gpt2' has no output embedding"):
        _ = Layout(model).head

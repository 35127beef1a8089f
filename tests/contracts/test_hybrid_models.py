"""Every method, with its own choice of layers, on models in which only some blocks have an MLP."""

from __future__ import annotations

from functools import cache

import pytest
import tiny_decoders
import torch
from method_examples import METHODS, make
from support import REQUESTS, tiny_tokenizer

from kedit_lightning import BaseModel
from kedit_lightning.base_models.layer_choice import nearest_attending_layers
from kedit_lightning.errors import KEditError, ModuleNotLocatedError
from kedit_lightning.methods import FTM, ROME

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
#: Mixtures, state-space mixers, convolutions, and MLPs that blocks share.
KINDS = ("jamba", "nemotron_h", "lfm2_moe", "zamba2")
#: Methods that change no weights of an MLP.
FREE = ("DeCo", "DoLa", "ICE", "IKE", "MeLLo", "PROMPT", "SERAC")
#: Methods that edit what a mixer writes where no block has an MLP of its own.
MIXED = (
    *(
        "AdaLoRA",
        "AlphaEdit",
        "AnyEdit",
        "CrispEdit",
        "DPOEdit",
        "EMMET",
        "FTL",
        "FTM",
        "LoRA",
        "LocFTBF",
    ),
    *("LyapLock", "MEMIT", "NSE", "ROME", "RROME", "UnKE"),
)
#: What is refused, and a part of the reason.
REFUSED = {
    ("nemotron_h", "PMET"): "no block of model type 'nemotron_h' has both attention",
    **{
        ("zamba2", name): "share it (weights are tied"
        for name, _ in METHODS
        if name not in (*FREE, *MIXED)
    },
}


@cache
def hybrid(kind: str) -> BaseModel:
    return BaseModel(tiny_decoders.tiny_decoder(kind), tiny_tokenizer(True), name=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "settings"), METHODS, ids=[name for name, _ in METHODS])
def test_methods_choose_blocks_that_have_what_they_need(kind, name, settings):
    base = hybrid(kind)
    if name == "ICE":  # its instruction is longer than the window of these models
        settings = {**settings, "instruction": ""}
    rows = base.rows([REQUESTS[0].prompt], [REQUESTS[0].target_new])
    reason = REFUSED.get((kind, name))
    if reason:
        with pytest.raises(ModuleNotLocatedError, match=r"; use (IKE|MEMIT)[^.]*$") as refusal:
            make(name, settings, base).edit(REQUESTS[:1])
        assert reason in str(refusal.value)
        return
    before = base.answer_logits(rows)
    edit = make(name, settings, base).edit(REQUESTS[:1])
    with edit:
        # Prompt edits change the rows themselves.
        during = base.answer_logits(base.rows([REQUESTS[0].prompt], [REQUESTS[0].target_new]))
    assert torch.equal(base.answer_logits(rows), before)
    assert (during - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "dense", "attending"),
    [("jamba", (0, 2), (0, 2)), ("lfm2_moe", (0, 1), (1,)), ("nemotron_h", (1, 3), None)],
)
def test_blocks_that_have_what_is_needed(kind, dense, attending):
    layout = hybrid(kind).layout
    assert layout.dense_layers == dense
    if attending is None:
        with pytest.raises(ModuleNotLocatedError, match="both attention and a dense MLP"):
            nearest_attending_layers(layout, range(9))
    else:
        assert nearest_attending_layers(layout, range(len(layout))) == attending


def test_a_mixer_behind_the_mlp_is_not_what_feeds_it():
    layout = hybrid("zamba2").layout
    for layer in range(1, len(layout)):  # the shared transformer runs first, and then Mamba
        assert "shared_transformer" in layout.block(layer).down
        assert "mamba" not in layout.attention(layer)


@pytest.mark.parametrize("method", [ROME, FTM])
def test_a_shared_mlp_is_refused_when_it_is_asked_for(method):
    chosen = {"layer": 1, "statistics": "identity"} if method is ROME else {"layers": [1]}
    with pytest.raises(KEditError, match="tied"):
        method(hybrid("zamba2"), **chosen).edit(REQUESTS[:1])

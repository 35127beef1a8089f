"""Parts of decoders found by structure, in every family, and how they write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import LLAMA_LIKE, SETTINGS, SHARED, tiny_base
from tiny_decoders import LAYERS, NORMALISING, tiny_decoder

from kedit_lightning.base_models.layout import Layout
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.edits.projections import as_rows, first_tensor, projection_shape
from kedit_lightning.errors import ModuleNotLocatedError

GPT = {**SHARED, "hidden_size": 32, "num_attention_heads": 4}
SMALL = {**LLAMA_LIKE, "num_hidden_layers": 3}
#: Settings of tiny models that share none with the Llama-like.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {**SHARED, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gptj": {
        **SHARED,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 8,
    },
    "gpt_neo": {
        **SHARED,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global"], 3]],
        "max_position_embeddings": 64,
    },
    "opt": {
        **GPT,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bart": {
        **SHARED,
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
    },
    "mamba": {**SHARED, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "t5": {},
    "bloom": {**SHARED, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {**GPT, "num_hidden_layers": 3, "ffn_hidden_size": 48},
    "mpt": {**SHARED, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "granite": {**SMALL, "residual_multiplier": 0.22},
    "glm": {**SMALL, "head_dim": 8},
    "glm4": {**SMALL, "head_dim": 8},
    "qwen3": {**SMALL, "head_dim": 16},
    "gemma": {**SMALL, "head_dim": 16},
    "gemma2": {**SMALL, "head_dim": 16},
    "gemma3_text": {**SMALL, "head_dim": 16},
}
#: Down projection and the matrices before it, inside block 1.
PLACES = {
    "gpt2": "transformer.h.1.mlp.c_proj: c_fc",
    "gptj": "transformer.h.1.mlp.fc_out: fc_in",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h: dense_h_to_4h",
    "gpt_neo": "transformer.h.1.mlp.c_proj: c_fc",
    "opt": "model.decoder.layers.1.fc2: fc1",
    "bloom": "transformer.h.1.mlp.dense_4h_to_h: dense_h_to_4h",
    "falcon": "transformer.h.1.mlp.dense_4h_to_h: dense_h_to_4h",
    "mpt": "transformer.blocks.1.ffn.down_proj: up_proj",
    "llama": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "mistral": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "qwen2": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "qwen3": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "phi": "model.layers.1.mlp.fc2: fc1",
    "phi3": "model.layers.1.mlp.down_proj: gate_up_proj",
    "stablelm": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "olmo": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "olmo2": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "cohere": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "starcoder2": "model.layers.1.mlp.c_proj: c_fc",
    "smollm3": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "exaone4": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "nemotron": "model.layers.1.mlp.down_proj: up_proj",
    "internlm3": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "glm": "model.layers.1.mlp.down_proj: gate_up_proj",
    "granite": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "glm4": "model.layers.1.mlp.down_proj: gate_up_proj",
    "gemma": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "gemma2": "model.layers.1.mlp.down_proj: gate_proj up_proj",
    "gemma3_text": "model.layers.1.mlp.down_proj: gate_proj up_proj",
}
GATED = {name for name, place in PLACES.items() if "gate" in place}


def _model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**OTHERS.get(family, SMALL), **settings})
    loader = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    return loader.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("family", PLACES)
def test_finds_the_parts_of_every_family(family):
    model = _model(family)
    layout = Layout(model)
    down, inner = PLACES[family].split(": ")
    owner = down.rpartition(".")[0]
    block = layout.block(1)
    assert block.down == down
    assert block.projections == (*(f"{owner}.{name}" for name in inner.split()), down)
    # Where the block has no module for its MLP, the projection stands for it.
    assert block.mlp == (down if family == "opt" else owner)
    assert block.name == owner if family == "opt" else owner.startswith(f"{block.name}.")
    assert len(layout) == 3
    assert [b.down for b in layout.blocks] == [down.replace(".1.", f".{i}.") for i in range(3)]
    assert layout.hidden_size == 32
    assert layout.is_gated == (family in GATED)
    assert projection_shape(model.get_submodule(down))[1] == 32
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PLACES)
def test_measures_how_a_down_projection_writes(family, dtype):
    path = Layout(_model(family, dtype)).write_path(1)
    assert path.is_linear == (family not in NORMALISING)
    if path.is_linear:
        gain = 0.22 if family == "granite" else 1.0
        assert path.gain == pytest.approx(gain, rel=0.02 if dtype == torch.bfloat16 else 1e-5)
    else:
        assert path.nonlinearity > 0.1


@pytest.mark.parametrize("family", [f for f in PLACES if f not in NORMALISING])
def test_a_linear_write_path_says_what_a_change_becomes(family):
    """The gain is what an independent change of the projection does to the block's output."""
    model = _model(family, torch.float64)
    layout = Layout(model)
    block, gain = layout.block(1), layout.write_path(1).gain
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64)
    ids = torch.tensor([[5, 9, 33]])
    seen = []

    def add(module, args, output):
        return output + vector if changed else None

    handles = [
        model.get_submodule(block.down).register_forward_hook(add),
        model.get_submodule(block.name).register_forward_hook(
            lambda module, args, output: seen.append(first_tensor(output))
        ),
    ]
    with torch.no_grad():
        for changed in (False, True):  # noqa: B007
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[1] - seen[0], (gain * vector).expand(1, 3, -1))


def test_outputs_are_tensors_or_tuples_and_weights_lie_either_way():
    """The families above cover all forms that the helpers must know."""
    forms, turned, flattened = set(), set(), set()
    for family in PLACES:
        model = _model(family)
        block = Layout(model).block(1)
        turned.add(isinstance(model.get_submodule(block.down), transformers.pytorch_utils.Conv1D))
        handles = [
            model.get_submodule(block.name).register_forward_hook(
                lambda module, args, output: forms.add(type(output))
            ),
            model.get_submodule(block.down).register_forward_hook(
                lambda module, args, output: flattened.add(output.dim() == 2)
            ),
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 9, 33], [7, 8, 2]]))
        for handle in handles:
            handle.remove()
    assert forms == {torch.Tensor, tuple}
    assert turned == {True, False}
    assert flattened == {True, False}
    assert as_rows(torch.zeros(6, 4), 2).shape == (2, 3, 4)
    assert as_rows(torch.zeros(2, 3, 4), 2).shape == (2, 3, 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "gemma2"])
def test_what_is_located_can_be_edited(family, tied, monkeypatch):
    monkeypatch.setitem(SETTINGS, family, OTHERS.get(family, SMALL))
    base = tiny_base(family, tie_word_embeddings=tied)
    rows = base.rows(["Rome is in", "The Eiffel Tower is in"], ["Italy", "Paris"])
    before = base.answer_logits(rows)
    for name in base.layout.block(0).projections:
        d_in, d_out = projection_shape(base.module(name))
        factors = torch.ones(1, d_in).double(), torch.ones(d_out, 1).double()
        with LowRankEdit(base, {name: factors}):
            assert not torch.equal(base.answer_logits(rows), before)


# ---- what has no dense MLP, and what merely looks odd


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        # The output of attention is wider than the model, as in all larger ones.
        (
            "qwen3_moe",
            {
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
            },
        ),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("phimoe", {"num_local_experts": 4}),
    ],
)
def test_routed_experts_are_found_and_are_no_dense_mlp(family, settings):
    model = _model(family, **settings)
    layout = Layout(model)
    assert len(layout) == 3
    with pytest.raises(ModuleNotLocatedError) as caught:
        layout.block(2)
    for part in ("layers.2", family, "routed experts", "FTM", "IKE"):
        assert part in str(caught.value)
    block = layout.mlp_block(2)
    assert block.is_routed
    assert block.down == f"{block.writer}.down_proj"
    assert layout.mlp_layers == (0, 1, 2)
    assert layout.is_gated
    assert layout.write_path(2).gain == pytest.approx(1, abs=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dense_layers_of_a_mixture_of_experts_can_be_edited():
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    layout = Layout(_model("qwen3_moe", mlp_only_layers=[1], **settings))
    assert layout.block(1).down == "model.layers.1.mlp.down_proj"
    assert layout.write_path(1).is_linear
    with pytest.raises(ModuleNotLocatedError, match=r"layers\.0"):
        layout.block(0)
    with pytest.raises(ModuleNotLocatedError, match=r"layers\.0"):
        _ = layout.blocks
    assert layout.mlp_layers == layout.dense_layers == (1,)
    assert layout.mlp_block(0).is_routed
    assert not layout.mlp_block(1).is_routed


def test_an_mlp_as_wide_as_the_model_is_no_attention():
    block = Layout(_model("llama", intermediate_size=32)).block(1)
    assert block.down == "model.layers.1.mlp.down_proj"
    assert [name.rpartition(".")[2] for name in block.projections] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    square = Layout(_model("gpt2", n_inner=32)).block(1)
    assert square.projections == ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj")


def test_a_mixer_of_tokens_is_no_mlp():
    model = _model("mamba")
    with pytest.raises(ModuleNotLocatedError, match="'mamba' has no dense MLP"):
        Layout(model).block(0)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_are_a_mixer_alone_are_edited_where_it_writes(family):
    layout = Layout(tiny_decoder(family))
    block = layout.mlp_block(-1)
    assert layout.mlp_layers == (0, 1, 2)
    assert block.down == block.writer == "backbone.layers.2.mixer.out_proj"
    assert layout.write_path(-1).gain == pytest.approx(1.0)
    for layer in (3, -4):
        with pytest.raises(ModuleNotLocatedError, match="does not exist"):
            layout.mlp_block(layer)


@pytest.mark.filterwarnings("ignore")
def test_a_mixer_is_left_alone_where_other_blocks_have_an_mlp():
    layout = Layout(tiny_decoder("nemotron_h"))
    assert layout.mlp_layers == (1, 3)
    with pytest.raises(ModuleNotLocatedError, match="no dense MLP"):
        layout.mlp_block(0)


def test_attention_beside_an_mlp_that_is_not_found_is_no_mixer():
    """Without the condition that a block is nothing else, attention would be edited."""
    model = _model("llama", head_dim=4)  # queries are narrower than hidden states
    for layer in model.model.layers:
        layer.mlp = _Opaque(layer.mlp)
    with pytest.raises(ModuleNotLocatedError, match="no dense MLP"):
        Layout(model).mlp_block(1)


class _Opaque(torch.nn.Module):
    """An MLP whose matrices are no projections that are known."""

    def __init__(self, mlp):
        super().__init__()
        self.up, self.down = (torch.nn.Parameter(m.weight) for m in (mlp.up_proj, mlp.down_proj))

    def forward(self, x):
        return (x @ self.up.T).relu() @ self.down.T


def test_dense_blocks_of_a_mixture_say_what_the_model_is_like():
    layout = Layout(tiny_decoder("jamba"))
    assert [block.name[-1] for block in layout.dense_blocks] == ["0", "2"]
    assert layout.is_gated
    with pytest.raises(ModuleNotLocatedError, match=r"layers\.0"):
        _ = Layout(tiny_decoder("mixtral")).dense_blocks


@pytest.mark.parametrize(
    ("family", "down", "inner", "has_mlp"),
    [
        # Each projection has an owner of its own, and there is no module of both.
        (
            "bert",
            "bert.encoder.layer.1.output.dense",
            "bert.encoder.layer.1.intermediate.dense",
            False,
        ),
        # The vision tower has as many blocks, and more parameters.
        (
            "git",
            "git.encoder.layer.1.output.dense",
            "git.encoder.layer.1.intermediate.dense",
            False,
        ),
        # Per-layer embeddings are projected after the MLP.
        ("gemma4_text", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj", True),
        # The configuration states the encoder's number of layers, which is another one.
        ("blenderbot", "model.decoder.layers.1.fc2", "model.decoder.layers.1.fc1", False),
        # The configuration states twice the number of blocks, as each has two MLPs.
        ("longcat_flash", "model.layers.1.mlps.1.down_proj", "model.layers.1.mlps.1.up_proj", True),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what transformers says about tiny settings
def test_unusual_blocks(family, down, inner, has_mlp):
    layout = Layout(tiny_decoder(family))
    block = layout.block(1)
    assert len(layout) == LAYERS
    assert block.down == down
    assert block.projections[-2:] == (inner, down)
    assert block.mlp == (down.rpartition(".")[0] if has_mlp else down)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba2", "a state-space mixer has none"),
        ("nemotron_h", "a state-space mixer has none"),
        ("hrm_text", "read 36 tokens where a text has 6, since it runs more than once"),
        ("cpmant", "read 38 tokens where a text has 6"),
        ("xlnet", "holds tokens before rows"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_mixes_or_repeats_tokens_is_refused(family, reason):
    """State-space mixers, blocks that run several times, tokens that come before rows."""
    with pytest.raises(ModuleNotLocatedError, match="that reads each token once") as refusal:
        Layout(tiny_decoder(family)).block(0)
    assert reason in str(refusal.value)


def test_one_token_further_is_far_enough_to_be_a_mixer():
    model = _model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, output: output + torch.nn.functional.pad(output, (0, 0, 1, -1))
        )
    with pytest.raises(ModuleNotLocatedError, match="no dense MLP"):
        Layout(model).block(1)


def test_an_mlp_that_runs_twice_is_refused():
    model = _model("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: module.forward(output))
    with pytest.raises(ModuleNotLocatedError, match="that reads each token once"):
        Layout(model).block(1)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma3n_text", "qwen4_exp_text"])
@pytest.mark.filterwarnings("ignore")
def test_a_block_with_several_residual_streams_has_no_single_gain(family):
    assert not Layout(tiny_decoder(family)).write_path(1).is_linear


def test_the_decoder_of_an_encoder_decoder_is_described():
    model = _model("t5", **{**SETTINGS["t5"], "num_decoder_layers": 2})
    layout = Layout(model)
    assert len(layout) == 2
    assert [block.down for block in layout.blocks] == [
        f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(2)
    ]
    assert layout.block(0).projections[0].endswith("DenseReluDense.wi")
    assert layout.write_path(1).is_linear
    gated = _model("t5", **SETTINGS["t5"], feed_forward_proj="gated-gelu")
    assert Layout(gated).is_gated
    layout = Layout(_model("bart"))
    assert [block.down for block in layout.blocks] == [
        f"model.decoder.layers.{i}.fc2" for i in range(2)
    ]
    layout = Layout(_model("bart", encoder_layers=2, encoder_ffn_dim=512))  # the larger half
    assert layout.block(0).down == "model.decoder.layers.0.fc2"


def test_the_encoder_of_an_encoder_decoder_is_described():
    layout = Layout(_model("t5", **{**SETTINGS["t5"], "num_decoder_layers": 2})).encoder
    assert [block.projections for block in layout.blocks] == [
        tuple(f"encoder.block.{i}.layer.1.DenseReluDense.{part}" for part in ("wi", "wo"))
        for i in range(3)
    ]
    assert layout.hidden_size == SETTINGS["t5"]["d_model"]
    for settings in ({}, {"decoder_layers": 3, "decoder_ffn_dim": 512}):  # the smaller half too
        layout = Layout(_model("bart", **settings)).encoder
        assert [block.down for block in layout.blocks] == [
            f"model.encoder.layers.{i}.fc2" for i in range(3)
        ]


# ---- numbers of layers


def test_layers_count_from_both_ends_and_errors_name_the_range():
    layout = Layout(_model("llama"))
    assert layout.block(-1) == layout.block(2)
    assert layout.block(-3) == layout.block(0)
    for index in (3, -4, 99):
        with pytest.raises(ModuleNotLocatedError, match=f"layer {index} .* 3 layers, 0 to 2"):
            layout.block(index)
        with pytest.raises(ModuleNotLocatedError, match=f"layer {index} "):
            layout.write_path(index)


def test_a_model_without_blocks_says_so():
    model = _model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModuleNotLocatedError, match=r"no list of 7 blocks.*'llama'"):
        len(Layout(model))
    model.config.num_hidden_layers = 0
    with pytest.raises(ModuleNotLocatedError, match="'llama' does not say how many layers"):
        len(Layout(model))


def test_probing_costs_few_passes_and_is_remembered(monkeypatch):
    model = _model("llama")
    passes = []
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(1))
    layout = Layout(model)
    assert not passes, "looking before anyone asked"
    _ = layout.blocks
    assert len(passes) == 2
    _ = layout.blocks, layout.block(0), layout.is_gated
    assert len(passes) == 2
    handle.remove()

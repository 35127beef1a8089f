"""Tiny random models of every type that transformers registers as a causal language model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from support import tiny_tokenizer

from kedit_lightning import BaseModel
from kedit_lightning.base_models import Layout, WritePath
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.projections import find_module, first_tensor, projection_shape
from kedit_lightning.errors import ModuleNotLocatedError

#: Some types whose blocks normalise the MLP's output before they add it.
NORMALISING = ("olmo2", "olmo3", "exaone4", "glm4", "gemma2", "gemma3", "gemma3_text")
LAYERS = 3
#: Usual standard deviation of a matrix at its start.
START = 0.02
WIDTH = 32
INNER = 48
HEADS = 4
TOKENS = 7
IDS = torch.arange(5, 5 + TOKENS)[None]
#: Fields in which configurations state how wide their MLPs are.
MLP_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "ffn_hidden_size",
    "dff",
    "dim_ff",
    "d_inner",
    "feed_forward_size",
    "moe_intermediate_size",
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
)
#: What a configuration's numbers are lowered to, wherever it has a field of that name.
SMALL = {
    field: value
    for value, fields in (
        (
            LAYERS,
            "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
            "num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack depth",
        ),
        (
            WIDTH,
            "hidden_size d_model n_embd emb_dim dim_model embedding_size embedding_dim lru_width "
            "hidden_size_global word_embed_proj_dim input_embedding_size output_embedding_size "
            "attention_hidden_size",
        ),
        (INNER, " ".join(MLP_WIDTHS)),
        (
            HEADS,
            "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
            "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
            "swa_num_attention_heads mamba_n_heads index_n_heads mamba_num_heads",
        ),
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
        (
            2,
            "num_key_value_heads num_experts_per_tok num_experts_per_token kv_n_heads num_kv_heads "
            "swa_num_key_value_heads linear_num_key_heads linear_num_value_heads moe_topk moe_k "
            "moe_top_k index_topk n_groups",
        ),
        (
            1,
            "n_group num_expert_group topk_group n_shared_experts num_shared_experts "
            "first_k_dense_replace",
        ),
        (
            8,
            "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim swa_head_dim "
            "index_head_dim rotary_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
            "mamba_d_state state_size ssm_state_size dim_head d_head attention_head_size "
            "mamba_chunk_size chunk_size hidden_size_per_layer_input "
            "laurel_rank",
        ),
        (16, "kv_lora_rank q_lora_rank o_lora_rank mamba_d_head mamba_head_dim"),
        (384, "vocab_size vocab_size_per_layer_input"),
        (
            64,
            "max_position_embeddings n_positions max_seq_len max_source_positions "
            "max_target_positions block_size",
        ),
    )
    for field in fields.split()
}
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": 2 * WIDTH // HEADS,
}
HYBRID = ["linear_attention", "linear_attention", "full_attention"]
QWEN4 = {
    "layer_types": HYBRID,
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
#: What single types need beyond that, most often since their defaults do not fit each other.
EXTRA: dict[str, dict[str, Any]] = {
    "aria_text": {"moe_num_shared_experts": 1},
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    # Its decoder alone counts its cache by the encoder's layers.
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"per_layer_config": None}},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "intermediate_size": [INNER] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "granite": {"residual_multiplier": 0.22},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"head_dim": 16},
    "minicpm3": {"scale_emb": 1},  # or blocks hardly matter beside the embeddings
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "vocab_size": 384,
    },
    "xmod": {"default_language": "en_XX"},
    # Its cache holds heads of widths rounded up to 64, and its layers do not.
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
}


def kinds() -> tuple[str, ...]:
    """Every type of model that transformers registers as a causal language model."""
    return tuple(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _lowered(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            settings[field] = _lowered(value)
        elif field in SMALL and isinstance(value, int) and not isinstance(value, bool):
            settings[field] = min(value, SMALL[field])
    if "kv_lora_rank" in settings:  # latent attention gives each head keys of its own
        settings["num_key_value_heads"] = HEADS
    for token, number in (("pad", 0), ("bos", 1), ("eos", 2)):
        if hasattr(config, f"{token}_token_id"):
            settings[f"{token}_token_id"] = number
    if hasattr(config, "is_decoder"):
        settings["is_decoder"] = True
    return settings


def tiny_config(kind: str) -> Any:
    """The configuration of a tiny model of a type."""
    config_class = transformers.CONFIG_MAPPING[kind]
    extra = EXTRA.get(kind, {})
    settings = _lowered(config_class())
    for field, value in extra.items():
        if isinstance(value, dict):
            settings[field] = {**settings.get(field, {}), **value}
        else:
            settings[field] = value
    return config_class(**settings)


def tiny_decoder(kind: str, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Any:
    """A model of a type with random weights, the same at every call.

    Matrices are larger than at their usual start, so that gates and routers choose.  Projections
    that start larger or at zero are brought to ``START`` before: some types would drown what an
    edit adds, and an MLP whose gate is zero gives no key.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind)).to(dtype).eval()
    with torch.no_grad():
        tokens = model.get_input_embeddings()
        for module in model.modules():  # embeddings of positions may be sines
            if isinstance(module, torch.nn.Linear) or module is tokens:
                spread = float(module.weight.std())
                if spread > 2 * START:
                    module.weight.mul_(START / spread)
                elif not module.weight.any():
                    module.weight.normal_(0, START)
        for parameter in model.parameters():
            # RWKV's mixing rates are vectors, and stay between 0 and 1.
            if parameter.dim() > 1 and parameter.shape[:2] != (1, 1):
                parameter.mul_(scale)
    return model


# ---- what the library makes of them


@dataclass(frozen=True)
class Finding:
    """What became of one type.

    Args:
        kind: The type.
        verdict: ``located``, ``in part`` (some blocks only), ``refused``, ``failed`` or
            ``not built``.
        reason: Why, for the last three.
        dense: Whether all blocks are without experts and some attend.
        places: Names of the down projections, a star for the number of the block.
        paths: How each of them writes to its block's output.
        layers: How many of the model's blocks they are in, and how many there are.
        reads_mask: Whether padding before a row changes nothing.
    """

    kind: str
    verdict: str
    reason: str = ""
    dense: bool = False
    places: tuple[str, ...] = ()
    paths: tuple[WritePath, ...] = ()
    layers: tuple[int, int] = (0, 0)
    reads_mask: bool = True


def _is_dense(model: Any) -> bool:
    """By the names that transformers gives its classes: experts nowhere, attention somewhere."""
    classes = " ".join(type(module).__name__.lower() for module in model.modules())
    return "expert" not in classes and "router" not in classes and "attention" in classes


def _mlp_widths(config: Any) -> set[int]:
    """Widths of MLPs that a configuration states, in the fields where it states them."""
    config = config.get_text_config(decoder=True)
    config = getattr(config, "ffn_config", None) or config
    stated = [getattr(config, field) for field in MLP_WIDTHS if getattr(config, field, None)]
    widths = {w for value in stated for w in (value if isinstance(value, list) else [value])}
    # Moshi and RecurrentGemma count the gate as well.
    return widths | {width // 2 for width in widths} if widths else {4 * WIDTH}


def what_is_wrong(model: Any, layout: Layout, index: int) -> str:
    """Judge a down projection by what it does, not by how it was found.

    A vector is added to what it writes for one token. The block's output must change there and
    nowhere before, by the vector times the gain where the path is said to be linear.
    """
    block, path = layout.mlp_block(index), layout.write_path(index)
    down = model.get_submodule(block.writer)
    place = block.down.removeprefix(block.name)
    mixer = re.search(r"(mixer|mamba)\.out_proj$", place) and len(block.projections) == 1
    if re.search("attn|attention|o_proj|q_proj|mixer.out", place) and not mixer:
        return f"{block.down} belongs to attention"
    projection = find_module(model, block.down)
    experts = projection.experts.count if isinstance(projection, ExpertProjection) else 1
    width = projection_shape(projection)[0] // experts
    if width not in _mlp_widths(model.config) and not mixer:
        return f"{block.down} reads {width} values"
    at, vector, seen = 3, torch.linspace(-1, 1, WIDTH), []

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        rows = output.clone().reshape(-1, WIDTH)
        rows[at] += vector
        return rows.reshape(output.shape)

    def keep(module: Any, args: Any, output: Any) -> None:
        rows = first_tensor(output)
        axis = rows.shape.index(TOKENS)
        seen.append(rows.movedim(axis, 0).reshape(TOKENS, -1, WIDTH))

    handles = [model.get_submodule(block.name).register_forward_hook(keep)]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        plain = seen[-1]
        handles.append(down.register_forward_hook(add))
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    moved = seen[-1] - plain
    if not moved[:at].abs().max() < 1e-3 * moved[at].abs().max():
        return f"{block.down} moved other tokens than the one it was changed for"
    if path.is_linear and not torch.allclose(moved[at], path.gain * vector, rtol=0.1, atol=0.05):
        return f"{block.down} does not arrive with the gain {path.gain:.3f}"
    return ""


def survey(kind: str) -> Finding:
    """Build a tiny model of a type, locate its down projections and judge them."""
    try:
        model = tiny_decoder(kind)
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    except Exception as error:  # whatever a model of another library may raise
        return Finding(kind, "not built", f"{type(error).__name__}: {' '.join(str(error).split())}")
    dense, layout, found, reason = _is_dense(model), Layout(model), [], ""
    try:
        _ = layout.mlp_layers  # raises where there is none, or where blocks share theirs
        for index in range(len(layout)):
            try:
                found.append((layout.mlp_block(index), layout.write_path(index)))
            except ModuleNotLocatedError as error:
                reason = reason or str(error)
                continue
            if wrong := what_is_wrong(model, layout, index):
                return Finding(kind, "failed", wrong, dense)
        total = len(layout)
    except ModuleNotLocatedError as error:
        return Finding(kind, "refused", str(error), dense)
    except Exception as error:
        return Finding(kind, "failed", f"{type(error).__name__}: {error}", dense)
    if not found:
        return Finding(kind, "refused", reason, dense, layers=(0, total))
    verdict = "in part" if reason else "located"
    places = {re.sub(r"\.\d+\.", ".*.", block.down, count=1): path for block, path in found}
    layers = (len(found), total)
    reads_mask = BaseModel(model, tiny_tokenizer(True)).batching.reads_mask
    paths = tuple(places.values())
    return Finding(kind, verdict, reason, dense, (*places,), paths, layers, reads_mask)

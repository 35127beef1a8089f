"""Files in the exact form of EasyEdit's ``hparams``, written for tests, and what they become."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

_LOCATED = """
stats_dir: "./stats"
device: 0
layers: [0, 1]
clamp_norm_factor: 3
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 4
v_lr: 4e-1
v_loss_layer: 3
v_weight_decay: 2e-3
kl_factor: 0.05
mom2_adjustment: true
mom2_update_weight: 70
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 1000
mom2_dtype: "float32"
model_parallel: false
"""
_RANK_ONE = (
    _LOCATED.replace("[0, 1]", "[1]")
    .replace("mom2_update_weight: 70\n", "")
    .replace(
        "mom2_adjustment: true",
        "mom2_adjustment: false\ncontext_template_length_params: [[5, 2], [10, 2]]",
    )
)
_TUNED = """
device: 0
layers: [1]
num_steps: 3
batch_size: 1
max_length: 40
lr: 6e-4
weight_decay: 0
kl_factor: 0
norm_constraint: 5e-4
rewrite_module_tmp: "model.layers.{}.mlp.down_proj.weight"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
model_parallel: false
"""
_ADAPTER = """
device: 0
layers: []
num_steps: 3
batch_size: 1
max_length: 30
lr: 6e-3
weight_decay: 0
kl_factor: 0
rank: 4
lora_alpha: 16
lora_dropout: 0.2
norm_constraint: false
target_modules: ["q_proj", "v_proj"]
model_parallel: false
"""
_FIT = """
model_class: LlamaForCausalLM
tokenizer_class: LlamaTokenizer
tokenizer_name: nano
inner_params:
- model.layers.2.mlp.up_proj.weight
- model.layers.2.mlp.down_proj.weight
archive: null
lr: 2e-6
edit_lr: 3e-4
lr_lr: 2e-4
seed: 5
cedit: 0.2
cloc: 0.9
cbase: 1.0
dropout: 0.0
train_base: False
no_grad_layers: null
device: cuda:0
batch_size: 2
model_save_pt: 5000
silent: False
max_iters: 45
log_interval: 20
eval_log_interval: 20
final_eval: True
val_interval: 30
early_stop_patience: 40
early_stop_key: "loss/total_edit_val"
eval_only: False
half: False
debug: False
save: False
verbose: True
val_batch_size: 5
accumulate_bs: 10
val_steps: 7
opt: Adam
grad_clip: 90.
results_dir: ./results
"""
_TRANSFORM = """
one_sided: False
n_hidden: 2
hidden_dim: null
init: id
norm: False
combine: True
x_only: False
delta_only: False
act: relu
rank: 12
mlp_class: IDMLP
shared: False
"""
_LOCATED_SETTINGS: dict[str, Any] = {
    "steps": 4,
    "lr": 0.4,
    "weight_decay": 0.002,
    "clamp": 3,
    "kl_factor": 0.05,
}
_TWO_LAYERS = {**_LOCATED_SETTINGS, "layers": [0, 1], "statistics": "auto"}
_FIT_SETTINGS: dict[str, Any] = {
    "seed_everything": 5,
    "clip": 90.0,
    "modules": ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"],
    "trainer.max_steps": 5,
    "trainer.max_epochs": -1,
    "trainer.val_check_interval": 3,
    "trainer.check_val_every_n_epoch": None,
    "trainer.limit_val_batches": 7,
    "trainer.log_every_n_steps": 2,
}
_TRANSFORM_SETTINGS = {
    **_FIT_SETTINGS,
    "lr": 2e-6,
    "edit_lr": 3e-4,
    "lr_lr": 2e-4,
    "c_edit": 0.2,
    "c_loc": 0.9,
    "accumulate": 10,
    "n_edits": 2,
    "blocks": 3,
    "rank": 12,
    "shared": False,
    "normalise": False,
    "own_wording": True,
    "n_rephrases": 0,
    "legacy_sign": True,
}


@dataclass(frozen=True)
class File:
    """A file, and what becomes of it: the class, all settings, and keys on which edits differ."""

    name: str
    text: str
    method: str
    settings: dict[str, Any]
    differs: tuple[str, ...] = ()
    base: dict[str, Any] = field(default_factory=lambda: {"base_model.dtype": "float32"})
    id: str = ""

    key: str = "alg_name"

    @property
    def whole(self) -> str:
        """The file as it is read; ``key`` is empty where the text has all of it."""
        head = f'{self.key}: "{self.name}"\nmodel_name: "nano"\n' if self.key else ""
        return f"{head}{self.text}"


FILES = (
    File(
        *("ROME", _RANK_ONE, "ROME"),
        {**_LOCATED_SETTINGS, "layer": 1, "statistics": "identity", "contexts": 4},
    ),
    File(
        *("R-ROME", f"{_RANK_ONE}fp16: true\n", "RROME"),
        {**_LOCATED_SETTINGS, "layer": 1, "statistics": "identity", "contexts": 4},
        base={"base_model.dtype": "float16"},
    ),
    File(
        *("R-ROME", f"{_RANK_ONE}original_implementation: true\n", "ROME"),
        {**_LOCATED_SETTINGS, "layer": 1, "statistics": "identity", "contexts": 4},
        id="R-ROME as ROME",
    ),
    File("MEMIT", f"{_LOCATED}batch_size: 3\n", "MEMIT", {
        **_TWO_LAYERS,
        "preserve": 70,
        "trainer.protocol.mode": "batch",
        "trainer.protocol.chunk_size": 3,
    }),
    File(
        *("PMET", f"{_LOCATED}nll_loss_factor: 1\n", "PMET"),
        {**_TWO_LAYERS, "preserve": 70},
    ),
    File(
        "EMMET",
        f"{_LOCATED}update_norm_lambda: 2\nemmet_lambda: 0.3\n",
        "EMMET",
        {
            **_LOCATED_SETTINGS,
            **{"layer": 1, "statistics": "auto", "preserve": 70, "ridge": 2, "eps": 0.3},
            "legacy_absolute_eps": True,
        },
        ("layers",),
    ),
    File(
        *("AlphaEdit", f'{_LOCATED}P_loc: "p.pt"\nnullspace_threshold: 3e-2\nL2: 2\n', "AlphaEdit"),
        {**_TWO_LAYERS, "threshold": 0.03, "legacy_size_cost": 2},
    ),
    File(
        "SPHERE",
        f'{_LOCATED}P_loc: "p.pt"\nnullspace_threshold: 2e-2\nL2: 1\ncumulative_ratio: 0.4\n'
        "suppression_strength: 0.6\n",
        "AlphaEdit",
        {**_TWO_LAYERS, "threshold": 0.02, "legacy_size_cost": 1, "off_main": 0.6},
        ("cumulative_ratio",),
    ),
    File(
        "EAMET",
        _LOCATED.replace("mom2_update_weight: 70", "mom2_update_weight: [60, 60]")
        + "ks_bs: 1\nclamp_ks_factor: 1.5\ncs_factor: 2\nmse_factor: 1\ntau: 0.07\n"
        'norm_factor: 1e-3\ndelta_init: "target_init"\nweight_decay_method: "norm"\n',
        "MEMIT",
        {**_TWO_LAYERS, "clamp": 1.5, "preserve": 60, "aligned": True},
        ("mse_factor", "norm_factor"),
    ),
    File(
        "UnKE",
        """{"model_name": "nano", "layers": [1], "clamp_norm_factor": 3, "layer_selection": "all",
    "fact_token": "last", "lr": 3e-4, "v_num_grad_steps": 6, "v_lr": 4e-1, "v_loss_layer": 3,
    "v_weight_decay": 2e-3, "optim_num_step": 5, "ex_data_num": 4,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head"}""",
        "UnKE",
        {
            **{"layer": 1, "clamp": 3, "lr": 3e-4, "value_steps": 6, "value_lr": 0.4},
            **{"value_decay": 0.002, "steps": 5, "texts": 4},
        },
        key="",
    ),
    File(
        "KN",
        "device: 0\nlr_scale: 1.0\nn_toks: 10\nrefine: false\nbatch_size: 4\nsteps: 8\n"
        "adaptive_threshold: 0.3\np: 0.4\n",
        "KN",
        {"steps": 8, "threshold": 0.3, "batch_size": 4},
    ),
    File(
        "ULTRAEDIT",
        "device: 0\nmodel_class: AutoModelForCausalLM\ntokenizer_class: AutoTokenizer\n"
        "tokenizer_name: nano\ninner_params:\n- model.layers.2.mlp.gate_proj\n"
        "- model.layers.3.mlp.up_proj\ndropout: 0.0\nno_grad_layers: null\nlr: 2e-6\ntoken: mask\n"
        "batch_size: 20\nbatch_size_once: 5\neditor_batch_size: 1024\nsilent: False\nhalf: true\n"
        "model_parallel: false\nresults_dir: ./results\n",
        "UltraEdit",
        {
            "modules": ["model.layers.2.mlp.gate_proj", "model.layers.3.mlp.up_proj"],
            **{"lr": 2e-6, "batch_size": 5, "legacy_shared_statistics": True},
            "trainer.protocol.mode": "sequential",
            "trainer.protocol.chunk_size": 20,
        },
        ("token",),
        {"base_model.dtype": "float16"},
    ),
    File(
        *("FT", f'{_TUNED}objective_optimization: "prompt_last"\n', "FTL"),
        {
            **{"layers": [1], "steps": 3, "batch_size": 1, "lr": 6e-4, "weight_decay": 0},
            **{"norm_constraint": 5e-4, "legacy_easyedit_objective": True},
        },
        id="FT-L",
    ),
    File(
        "FT",
        _TUNED.replace("5e-4", "false").replace("down_proj.weight", "up_proj.weight")
        + 'objective_optimization: "target_new"\n',
        "FTM",
        {
            **{"layers": [1], "steps": 3, "batch_size": 1, "lr": 6e-4, "weight_decay": 0},
            **{"norm_constraint": math.inf, "objective": "target_new", "modules": ["mlp.up_proj"]},
        },
        id="FT-M",
    ),
    File(
        *("LoRA", f'lora_type: "lora"\n{_ADAPTER}', "LoRA"),
        {
            **{"steps": 3, "batch_size": 1, "lr": 6e-3, "rank": 4, "alpha": 16, "dropout": 0.2},
            **{"target_modules": ["q_proj", "v_proj"], "stop_loss": 0.0},
        },
    ),
    File(
        *("LoRA", f'lora_type: "adalora"\n{_ADAPTER}', "AdaLoRA"),
        {
            **{"steps": 3, "batch_size": 1, "lr": 6e-3, "rank": 4, "alpha": 16, "dropout": 0.2},
            **{"target_modules": ["q_proj", "v_proj"], "initial_rank": 12},
        },
        ("rank",),
        id="AdaLoRA",
    ),
    File(
        "QLoRA",
        "device: 0\nquantization_bit: 4\ndouble_quant: true\nquant_type: \"nf4\"\n"
        'lora_type: "lora"\nlora_r: 4\nlora_alpha: 16\nlora_dropout: 0.2\n'
        'target_modules: ["q_proj"]\nnum_steps: 2\nbatch_size: 1\nmax_length: 30\nlr: 6e-3\n'
        "weight_decay: 0.0\nmodel_parallel: false\n",
        "QLoRA",
        {
            **{"rank": 4, "alpha": 16, "dropout": 0.2, "target_modules": ["q_proj"], "steps": 2},
            **{"batch_size": 1, "lr": 6e-3, "stop_loss": 0.0},
        },
        base={"base_model.quantization": "4bit"},
    ),
    File(
        *("DPO", f'lora_type: "adalora"\n{_ADAPTER}alpha: 0.98\nbeta: 0.2\n', "DPOEdit"),
        {
            **{"steps": 3, "batch_size": 1, "lr": 6e-3, "rank": 4, "alpha": 16, "dropout": 0.2},
            **{"target_modules": ["q_proj", "v_proj"], "likelihood": 0.98, "beta": 0.2},
            "stop_loss": 0.0,
        },
        ("lora_type",),
    ),
    File(
        "DINM",
        _TUNED.replace("layers: [1]", "layers: []")
        .replace("5e-4", "false")
        .replace("kl_factor: 0", "kl_factor: 0.2")
        + 'model_class: LlamaForCausalLM\ntokenizer_class: LlamaTokenizer\n'
        'suffix_system_prompt: "Be kind:"\nmax_output_length: 60\n',
        "DINM",
        {
            **{"steps": 3, "lr": 6e-4, "edit_weight": 0.2, "suffix": "Be kind:"},
            **{"trainer.protocol.max_new_tokens": 60, "legacy_easyedit": True},
        },
    ),
    File(
        "GRACE",
        "device: 1\ninner_params:\n- model.layers[2].mlp.down_proj.weight\nedit_lr: 0.9\n"
        "n_iter: 6\neps: 1.5\ndist_fn: euc\nval_init: warm\nval_train: sgd\nval_reg: None\n"
        "reg: early_stop\nreplacement: replace_prompt\neps_expand: coverage\nnum_pert: 8\n"
        "dropout: 0.0\n",
        "GRACE",
        {
            **{"layer": 2, "lr": 0.9, "steps": 6, "radius": 1.5, "value_init": "warm"},
            "replacement": "prompt",
        },
    ),
    File(
        "GRACE",
        "device: 1\ninner_params:\n- model.layers[2].mlp.up_proj.weight\nedit_lr: 0.9\nn_iter: 6\n"
        "eps: 1.5\ndist_fn: cos\nval_init: cold\nval_train: sgd\nval_reg: None\nreg: early_stop\n"
        "replacement: replace_last\neps_expand: coverage\nnum_pert: 8\ndropout: 0.0\n",
        "GRACE",
        {
            **{"module": "model.layers.2.mlp.up_proj", "lr": 0.9, "steps": 6, "radius": 1.5},
            **{"value_init": "cold", "replacement": "last"},
        },
        ("dist_fn",),
        id="GRACE at another projection",
    ),
    File(
        "WISE",
        "device: 0\nmask_ratio: 0.3\nedit_lr: 0.8\nn_iter: 5\nnorm_constraint: 0.9\n"
        "act_margin: [4.0, 15.0, 8.0]\nact_ratio: 0.8\nsave_freq: 4\nmerge_freq: 12\n"
        "merge_alg: 'dare_ties'\nobjective_optimization: 'only_label'\ninner_params:\n"
        "- model.layers[2].mlp.down_proj.weight\ndensities: 0.6\nweights: 1.0\nretrieve: False\n"
        "replay: False\n",
        "WISE",
        {
            **{"mask_ratio": 0.3, "lr": 0.8, "steps": 5, "norm_constraint": 0.9, "alpha": 4.0},
            **{"beta": 15.0, "gamma": 8.0, "activation_ratio": 0.8, "shard_size": 4},
            **{"shards_per_memory": 3, "merge": "dare_ties", "layer": 2, "density": 0.6},
            **{"retrieve": False, "replay": 0, "decay": False},
        },
    ),
    File(
        "DEFER",
        "device: 0\ninner_params:\n- model.layers[2].mlp.down_proj.weight\nedit_lr: 8e-5\n"
        "n_iter: 9\nthreshold: 0.5\n",
        "DEFER",
        {"layer": 2, "lr": 8e-5, "steps": 9, "stop_loss": 0.0},
    ),
    File(
        "MELO",
        """# @package _global_
alg_name: MELO
model_parallel: false
device: 1
max_length: 512
task: hall
lora_task_type: CAUSAL_LM
check_dir: null
grace:
  name: grace
  num_iter: 6
  init_radius: 0.4
  dist_fn: euc
  val_init: cold
  val_train: sgd
  val_reg: None
  reg: early_stop
  replacement: replace_prompt
  expand_mode: moving_avg
  num_pert: 8
  key_id: -1
  num_edit_per_block: 3
  num_block: 20
  num_rank_per_block: 2
  metric_period: 400
  edit_lr: 0.002
model:
  name: nano
  class_name: LlamaForCausalLM
  tokenizer_class: LlamaTokenizer
  tokenizer_name: nano
  fan_in_fan_out: False
  target_modules:
    - model.layers.3.mlp.up_proj
    - model.layers.4.mlp.up_proj
  pt: checkpoint
  grace_layer: model.layers.2.mlp.up_proj
lora:
  cls_name: distilbert-base-cased
  cls_class: AutoModel
  supervised: true
  cos: false
  freeze: null
  square: true
  bound_embeds: false
  use_all_negatives: false
  freeze_lora: false
  dist_heads: 1
  cross_attend: false
  soft_weighting: false
  checkpoint_grad: false
  lora_r: 64
  lora_alpha: 64
  lora_dropout: 0.0
""",
        "MELO",
        {
            **{"steps": 6, "radius": 0.4, "facts_per_block": 3, "rank": 2, "scale": 20.0},
            **{"lr": 0.002, "key_layer": 2, "projection": 0, "layers": [3, 4]},
        },
        key="",
    ),
    File("MEND", f"{_FIT}{_TRANSFORM}", "MEND", _TRANSFORM_SETTINGS, key="alg"),
    File(
        "MEND",
        f"{_FIT}{_TRANSFORM}lr_scale: 1.0\nalg: MEND\n".replace(
            "archive: null", "archive: ./mend-network"
        ),
        "MEND",
        {
            **_TRANSFORM_SETTINGS,
            "trainer.protocol.mode": "batch",
            "trainer.protocol.chunk_size": 2,
        },
        ("archive",),
        id="MEND for edits",
    ),
    File(
        "KE",
        _FIT,
        "KE",
        {**_FIT_SETTINGS, "lr": 2e-6, "accumulate": 10, "n_edits": 2},
        key="alg",
    ),
    File(
        "MALMEN",
        _FIT.replace("lr_lr: 2e-4\n", "").replace("edit_lr: 3e-4\n", "")
        .replace("cedit: 0.2\ncloc: 0.9\ncbase: 1.0\n", "").replace("accumulate_bs: 10\n", "")
        .replace("grad_clip: 90.\n", "").replace("opt: Adam\n", "")
        + "rank: 12\nn_blocks: 2\nmeta_lr: 2e-5\nloc_coef: 0.7\nmax_grad_norm: 2\ntoken: mask\n"
        "n_edits: 8\neditor_batch_size: 1024\n",
        "MALMEN",
        {
            **_FIT_SETTINGS,
            **{"trainer.max_steps": 45, "trainer.val_check_interval": 30},
            **{"trainer.log_every_n_steps": 20, "clip": 2, "edit_lr": 2e-6, "lr": 2e-5},
            **{"c_loc": 0.7, "c_edit": 1.0, "blocks": 2, "rank": 12, "n_edits": 8, "at_once": 2},
            "tokens": "all",
        },
        key="alg",
    ),
    File(
        "SERAC",
        _FIT.replace(
            "inner_params:\n- model.layers.2.mlp.up_proj.weight\n"
            "- model.layers.2.mlp.down_proj.weight\n",
            "inner_params: []\nsmall_name: ./small\ncls_name: ./distilbert\ncls_class: AutoModel\n",
        )
        + "supervised: False\nsoft_weighting: False\ncheckpoint_grad: False\ncross_attend: False\n"
        "cos: False\nfreeze: null\nsquare: True\nbound_embeds: False\nuse_all_negatives: False\n"
        "freeze_cntr: False\ndist_heads: 1\nlora: null\nedit_bs: 1\nlog_errors: False\n"
        "unlikelihood: True\n",
        "SERAC",
        {
            **{key: value for key, value in _FIT_SETTINGS.items() if key != "modules"},
            **{"lr": 2e-6, "c_edit": 0.2, "c_loc": 0.9, "counterfactual": "./small"},
            "batch_size": 20,
        },
        ("supervised",),
        key="alg",
    ),
    File(
        *("IKE", 'sentence_model_name: "./mini"\ndevice: 0\nresults_dir: "./r"\n\nk: 5\n', "IKE"),
        {"demonstrations": 5, "retriever": "./mini"},
    ),
    File(
        "IKE",
        'sentence_model_name: "./mini"\ndevice: 0\nresults_dir: "./r"\n\nk: 5\n'
        "use_icl_examples: False\n",
        "PROMPT",
        {"retriever": "./mini"},
        id="PROMPT",
    ),
    File(
        *("dola", 'device: 1\ndola_layers: "low"\nfinal_layer: 32\n', "DoLa"),
        {"layers": "low", "legacy_divergence": True},
    ),
    File(
        "deco",
        "device: 1\nalpha: 0.5\nthreshold_top_p: 0.8\nthreshold_top_k: 10\n"
        "early_exit_layers: [3, 4]\nmodel_parallel: true\n",
        "DeCo",
        {
            **{"alpha": 0.5, "top_p": 0.8, "top_k": 10, "layers": [3, 4]},
        },
        base={"base_model.dtype": "float32", "base_model.device_map": "auto"},
    ),
)  # fmt: skip

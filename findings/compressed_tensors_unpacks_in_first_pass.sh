#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.1: a model that is loaded from packed 8-bit weights is packed until its first
# forward pass, which unpacks all of them for good. Its parameters then have other names and the size of float32, and `is_quantized`
# still says True. Sizes, hashes and lists of parameters taken after loading describe another model than the one that runs, and memory
# that was planned for packed weights does not suffice.
#
# Seen with compressed-tensors 0.20.1, transformers 5.23.0, torch 2.13.0, Python 3.11:
#   loaded: ['weight_packed', 'weight_scale', 'weight_shape'] 8464 bytes
#   after one pass: ['weight', 'weight_scale', 'weight_shape'] 33040 bytes; is_quantized is True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0 compressed-tensors==0.20.1
cat > "$folder/run.py" <<'PYTHON'
import sys
import tempfile

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
source = LlamaForCausalLM(config).eval()
weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
quantisation = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
apply_quantization_config(source, quantisation)
for module in source.modules():
    if hasattr(module, "weight_scale"):
        module.weight_scale.data = (module.weight.abs().amax(1, keepdim=True) / 127).to(module.weight_scale.dtype)
compressor = ModelCompressor(quantization_config=quantisation)
compressor.compress_model(source)
folder = tempfile.mkdtemp()
source.save_pretrained(folder)
compressor.update_config(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
down = model.model.layers[0].mlp.down_proj
print("compressed-tensors", compressed_tensors.__version__, "transformers", transformers.__version__)


def names():
    return sorted(name for name, _ in down.named_parameters())


def size():
    return sum(p.numel() * p.element_size() for p in down.parameters())


before = names(), size()
print("loaded:", *before, "bytes")
with torch.no_grad():
    model(input_ids=torch.arange(4)[None])
after = names(), size()
print("after one pass:", *after, "bytes; is_quantized is", getattr(model, "is_quantized", None))
same = before[0][0] == "weight_packed" and after[0][0] == "weight" and after[1] > 3 * before[1]
sys.exit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

#!/usr/bin/env bash
# transformers 5.23.0: in Mllama (Llama 3.2 Vision) the text in front of a picture sees it. `cross_attention_mask` is 0 for tokens before
# the picture, but a row of it that is all 0 is turned into one that attends to everything, and only the output of the MLP behind
# it is set to zero: the output of the attention stays in the residual. So logits of tokens before the picture change with the
# picture, although the decoder is causal and the mask forbids it, and with how many pictures a row is padded to. Prompts that
# begin with the picture, as the tests of the library do, show nothing (huggingface/transformers#39379).
#
# Seen with transformers 5.23.0, torch 2.13.0, Python 3.11:
#   mask of the picture:                     0 0 0 1 1 1
#   logits that change with the picture:     1 1 1 1 1 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import MllamaConfig, MllamaForConditionalGeneration

torch.manual_seed(0)
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_global_layers=1, attention_heads=2,
              vision_output_dim=32, image_size=8, patch_size=4, max_num_tiles=1, intermediate_layers_indices=[0],
              supported_aspect_ratios=[[1, 1]])
model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_index=63)).eval()
layer = model.model.language_model.layers[1]
for gate in (layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate):  # closed in a fresh model, open in a trained one
    torch.nn.init.constant_(gate, 1.0)
print("transformers", transformers.__version__, "torch", torch.__version__)

ids = torch.tensor([[5, 6, 7, 63, 8, 9]])  # the picture's token is the fourth
sees = torch.tensor([0, 0, 0, 1, 1, 1])[None, :, None, None]  # [batch, tokens, pictures, tiles], as the processor makes it


def moved():
    """At which places the logits change when the picture does."""
    logits = []
    for seed in (1, 2):
        picture = torch.randn(1, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            logits.append(model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=picture, cross_attention_mask=sees,
                aspect_ratio_ids=torch.ones(1, 1, dtype=torch.long), aspect_ratio_mask=torch.ones(1, 1, 1, dtype=torch.long),
            ).logits[0])
    return [bool(d > 1e-6) for d in (logits[0] - logits[1]).abs().amax(-1)]


found = moved()
print("mask of the picture:                    ", *sees.flatten().tolist())
print("logits that change with the picture:    ", *map(int, found))
sys.exit(0 if found == [True] * 6 else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

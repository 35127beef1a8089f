#!/usr/bin/env bash
# transformers 5.23.0: PaliGemma without `token_type_ids` reads every token in both directions, also in rows of text alone and in
# evaluation mode, where the same call of any other decoder is causal. Teacher forcing then sees the answer it scores: logits of the
# answer's first token change with its last one. Only `token_type_ids` with 1 on the answer, which its processor makes from `suffix`,
# and a tokenizer never does, keep answers causal behind a prompt that is read in both directions.
#
# Seen with transformers 5.23.0, torch 2.13.0, Python 3.11:
#   logits that change with the last token, ids alone:           1 1 1 1 1 1
#   the same with token_type_ids 0 0 0 1 1 1 (1 is the answer):  0 0 0 0 0 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

torch.manual_seed(0)
text = dict(model_type="gemma", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8, vocab_size=64)
vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=1,
              num_attention_heads=2, image_size=28, patch_size=14)
config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=32, hidden_size=32)
model = PaliGemmaForConditionalGeneration(config).eval()
print("transformers", transformers.__version__, "torch", torch.__version__)
first = torch.tensor([[2, 10, 11, 12, 13, 14]])
other = first.clone()
other[0, -1] = 40


def moved(**more):
    """At which places the logits change when the last token does."""
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0] for ids in (first, other))
    return [bool(d > 1e-6) for d in (a - b).abs().amax(-1)]


answer = torch.tensor([[0, 0, 0, 1, 1, 1]])
plain, typed = moved(), moved(token_type_ids=answer)
print("logits that change with the last token, ids alone:          ", *map(int, plain))
print("the same with token_type_ids 0 0 0 1 1 1 (1 is the answer): ", *map(int, typed))
same = all(plain) and typed == [False] * 5 + [True]
sys.exit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

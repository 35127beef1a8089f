#!/usr/bin/env bash
# transformers 5.23.0: a sliding window counts columns, not tokens. Padding in front of a row changes nothing; padding inside one,
# where a cached beginning of one length meets tails of several lengths, pushes tokens out of the window although it is
# masked and position_ids count only tokens. The answer is then another one than that of the row by itself. The same weights
# without a window give equal logits. So a shared prefix cache with padded tails is exact for full attention alone.
#
# Seen with transformers 5.23.0, torch 2.13.0, Python 3.11 (a random Mistral of two layers, window 4):
#   padding in front: below 1e-6; padding inside: 0.0654; the same without a window: below 1e-6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import transformers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def model(window):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


@torch.no_grad()
def last(network, ids, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return network(ids, attention_mask=mask, position_ids=positions).logits[0, -1]


windowed, full = model(4), model(None)
ids = torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(1))
padding = torch.zeros(1, 3, dtype=torch.long)
ones = torch.ones_like(ids)
front = torch.cat([padding, ids], 1), torch.cat([padding, ones], 1)
inside = torch.cat([ids[:, :6], padding, ids[:, 6:]], 1), torch.cat([ones[:, :6], padding, ones[:, 6:]], 1)
print("transformers", transformers.__version__, "torch", torch.__version__)
found = {
    "padding in front": (windowed, front),
    "padding inside": (windowed, inside),
    "the same without a window": (full, inside),
}
apart = {}
for name, (network, padded) in found.items():
    apart[name] = (last(network, *padded) - last(network, ids, ones)).abs().max().item()
    print(f"{name}: {apart[name]:.3g}")
small = max(apart["padding in front"], apart["the same without a window"]) < 1e-5
sys.exit(0 if small and apart["padding inside"] > 1e-3 else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

#!/usr/bin/env bash
# torch 2.13.0, CPU: a fused optimizer pairs the numbers of a gradient with those of its parameter by their place in memory,
# not by their index. A gradient of another memory layout than its parameter, such as the transpose of a product, which is
# what a rule of one's own for the backward pass often returns, then updates other weights than those it belongs to.
# There is no warning; the plain optimizer and `.contiguous()` give the right step. `fused=True` is offered as a speed-up alone.
#
# Seen with torch 2.13.0 (CPU build), Python 3.11:
#   Adam: largest difference from the plain step 0.2, after .contiguous() 0.0
#   SGD: largest difference from the plain step 0.235685, after .contiguous() 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
start = torch.randn(4, 6)
column_major = torch.randn(6, 4).t()  # of the parameter's shape


def stepped(kind, gradient, fused):
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = gradient
    kind([parameter], lr=0.1, fused=fused).step()
    return parameter.detach()


print("torch", torch.__version__)
same = True
for kind in (torch.optim.Adam, torch.optim.SGD):
    right = stepped(kind, column_major, False)
    wrong = (stepped(kind, column_major, True) - right).abs().max().item()
    mended = (stepped(kind, column_major.contiguous(), True) - right).abs().max().item()
    print(f"{kind.__name__}: largest difference from the plain step {wrong:.6g}, after .contiguous() {mended}")
    same = same and wrong > 0.01 and mended < 1e-6
sys.exit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

#!/usr/bin/env bash
# peft 0.21.2: LoRA of a three-dimensional parameter (`target_parameters`, as mixtures of experts hold their weights) keeps the
# factors of all experts in two matrices, and each in another order. Rows of lora_A are sorted by expert (expert 0's ranks,
# then expert 1's); columns of lora_B by rank (rank 0 of every expert, then rank 1). Who reads both alike takes factors of
# different experts for one, with shapes that fit.
# And a pass through the model moves the parameter to the end of its module: `parameters()` has another order afterwards, so
# that a flat copy of the weights, or a hash over them in their order, no longer fits.
#
# Seen with peft 0.21.2, torch 2.13.0, transformers 5.23.0, Python 3.11:
#   lora_A (6, 4), lora_B (5, 6), 3 experts of rank 2
#   the change of an expert is B A with A in order: expert, B in order: rank
#   before a pass: first, bank, last; after it: first, last, bank
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import sys

import peft
import torch

EXPERTS, RANK = 3, 2


class Bank(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(1))
        self.bank = torch.nn.Parameter(torch.randn(EXPERTS, 5, 4))
        self.last = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.bank, x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixture = Bank()

    def forward(self, x):
        return self.mixture(x)


torch.manual_seed(0)
model = Model()
bank = model.mixture
before = [name for name, _ in bank.named_parameters()]
wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=["mixture.bank"]))
layer = wrapped.base_model.model.mixture
a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
with torch.no_grad():
    a.normal_()
    b.normal_()
change = layer.get_delta_weight("default").detach()
print("peft", peft.__version__, "torch", torch.__version__)
print(f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}, {EXPERTS} experts of rank {RANK}")
orders_a = {"expert": a.view(EXPERTS, RANK, 4), "rank": a.view(RANK, EXPERTS, 4).transpose(0, 1)}
orders_b = {"expert": b.view(5, EXPERTS, RANK).permute(1, 0, 2), "rank": b.view(5, RANK, EXPERTS).permute(2, 0, 1)}
fits = [
    (name_a, name_b)
    for name_a, factors_a in orders_a.items()
    for name_b, factors_b in orders_b.items()
    if torch.allclose(factors_b @ factors_a, change, atol=1e-5)
]
for name_a, name_b in fits:
    print(f"the change of an expert is B A with A in order: {name_a}, B in order: {name_b}")
wrapped(torch.randn(2, 4))
after = [name for name, _ in bank.named_parameters()]
print(f"before a pass: {', '.join(before)}; after it: {', '.join(after)}")
same = fits == [("expert", "rank")] and after == ["first", "last", "bank"]
sys.exit(0 if same else "the behaviour has changed")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

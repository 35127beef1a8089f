"""What edits of routed experts do: ``nano`` as a mixture of experts, and its facts.

    python benchmarks/mixture.py             40 facts, some minutes
    python benchmarks/mixture.py --limit 10 --methods ROME

Each MLP of ``nano`` becomes four equal experts of a Mixtral, of which a router with random weights
picks two for each token.  Unedited, the mixture therefore answers as ``nano`` does, which is
checked; an edit reaches the experts that are picked, so that what other wordings of a fact see of
it depends on the router.
"""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers
from scores import SINGLE, header, markdown, score

from kedit_lightning import BaseModel
from kedit_lightning.data import NanoFacts

EXPERTS, PICKED = 4, 2
#: Largest difference of logits from those of ``nano``, in float32.
SAME = 1e-2


def as_mixture(base: BaseModel) -> BaseModel:
    """The mixture of copies of a Llama's MLPs."""
    given, known = base.model.config.to_dict(), vars(transformers.MixtralConfig())
    # Its own type and version stay, and a Llama has no fields of a mixture's.
    shared = {k: v for k, v in given.items() if k in known and k not in ("model_type", "dtype")}
    config = transformers.MixtralConfig(
        **shared, num_local_experts=EXPERTS, num_experts_per_tok=PICKED
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    state = dict(base.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp"
        gate, up, down = (state.pop(f"{stem}.{n}_proj.weight") for n in ("gate", "up", "down"))
        copies = (EXPERTS, 1, 1)
        state[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up]).repeat(copies)
        state[f"{stem}.experts.down_proj"] = down.repeat(copies)
        drawn = torch.randn(EXPERTS, config.hidden_size, generator=generator)
        state[f"{stem}.gate.weight"] = drawn / config.hidden_size**0.5
    model.load_state_dict(state)
    return BaseModel(model, base.tokenizer, name="nano as a mixture")


def check_equal(mixture: BaseModel, base: BaseModel) -> float:
    """Largest difference of logits of the two on prompts."""
    prompts = ["Marie Curie was born in", "The capital of Italy is"]
    with torch.no_grad():
        found, wanted = (b.answer_logits(b.rows(prompts, ["Rome"] * 2)) for b in (mixture, base))
    difference = float((found - wanted).abs().max())
    if not difference < SAME:
        raise SystemExit(f"the mixture differs from nano by {difference:.2g} in its logits")
    return difference


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=["ROME", "MEMIT", "FTM"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # statistics from few samples say so each time
    base = BaseModel.load("nano")
    mixture = as_mixture(base)
    print(f"logits of the mixture differ from nano's by at most {check_equal(mixture, base):.1g}")
    data = NanoFacts(limit=given.limit, seed=0)
    print(header())
    for model in (mixture, base):
        for name in given.methods:
            print(markdown(score(model, "NanoFacts", data, name, SINGLE)), flush=True)


if __name__ == "__main__":
    main()

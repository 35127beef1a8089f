"""A metric with a measurement of its own: how certain the edited model is of its first token.

A package offers it in the entry-point group `kedit_lightning.plugins`, which names this module.
"""

import torch

from kedit_lightning import EditTrainer, registry
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods import ROME
from kedit_lightning.metrics import ForwardPass, Measurement, ProbeMean


def first_entropy(forward: ForwardPass) -> list[float]:
    """Entropy of the next-token distribution behind each prompt, in nats."""
    return torch.special.entr(forward.log_probs[:, 0].exp()).sum(-1).tolist()


class FirstTokenEntropy(ProbeMean):
    """Entropy of the distribution that the answer's first token is drawn from."""

    name = "entropy"
    kinds = ("rewrite", "rephrase")
    measurements = (Measurement("first_token_entropy", "answer", first_entropy),)
    higher_is_better = False


ENTRY = registry.register(
    registry.Entry("metric", "FirstTokenEntropy", __name__, "entropy of the first answer token")
)

if __name__ == "__main__":
    rome = ROME(base_model="nano")
    EditTrainer(accelerator="cpu").test(rome, NanoFacts(limit=5), verbose=False)
    for row in rome.summary:
        if row.key.endswith("/entropy"):
            print(f"{row.key}: {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}], {row.n} cases")

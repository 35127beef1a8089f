"""Settings of models without published ones, by how large hidden states are beside values."""

from __future__ import annotations

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.locate.shared.closed_form_settings import (
    HIDDEN_CLAMP,
    STEPS,
    WEIGHT_DECAY,
    LocateSettings,
)
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.requests import EditRequest
from kedit_lightning.statistics import few_sample_texts

#: Texts that are read, and words of each.
TEXTS, WORDS = 16, 8
#: What is normalised before it is added may turn anywhere, whatever its norm (ROME's clamp).
NORMALISED = 4.0


def scaled_settings(base: BaseModel, site: Site) -> LocateSettings:
    """How values of a site are optimised in a model without published settings."""
    clamp = HIDDEN_CLAMP * hidden_ratio(base, site)
    return LocateSettings(steps=STEPS, clamp=clamp, weight_decay=WEIGHT_DECAY)


def hidden_ratio(base: BaseModel, site: Site) -> float:
    """Median of ``‖h‖ / ‖z‖`` at words of plain text, without edits.

    ``h`` is the block's output and ``z`` the values of the site, of several the mean of their
    norms.  It is 1 where values are the block's output, and ``NORMALISED`` where the block
    normalises them before it adds them.
    """
    if not site.inside:
        return 1.0
    with base.edits.suspended():
        if not base.layout.write_path(site.block).is_linear:
            return NORMALISED
    prefixes = [text.split()[:WORDS] for text in few_sample_texts()[:TEXTS]]
    requests = [EditRequest(" ".join(words), ".", subject=words[-1]) for words in prefixes]
    block = base.layout.block_name(site.block)
    with base.edits.suspended():
        outputs = subject_states(base, [*site.modules, block], requests).outputs
    values = torch.stack([outputs[name][:, 0].float().norm(dim=1) for name in site.modules])
    ratio = outputs[block][:, 0].float().norm(dim=1) / values.mean(0)
    usual = ratio[ratio.isfinite()]
    return float(usual.median()) if len(usual) else 1.0

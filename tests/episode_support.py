"""A few facts with rephrases and locality probes, to fit methods on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import REQUESTS

from kedit_lightning import BaseModel, EditBatch, EditExample, EditRequest, Probe
from kedit_lightning.data import Requests
from kedit_lightning.methods.hypernetwork.shared.outer_loss import OuterLosses, outer_losses
from kedit_lightning.methods.training.episodes import Episode


def example(request: EditRequest) -> EditExample:
    """A request with two rephrases and two locality probes, one without an answer."""
    probes = [
        Probe("rephrase", f"It is known that {request.prompt}", (request.target_new,)),
        Probe("rephrase", f"Question: {request.prompt}", (request.target_new,)),
        Probe("locality", "The company Bolt was founded in", ("Berlin",), "neighborhood"),
        Probe("locality", "She was born in", (), "neighborhood"),
    ]
    return EditExample.from_request(request, request.id, probes)


EXAMPLES = [example(request) for request in REQUESTS]


def batch_gradient(method: Any, batch: EditBatch) -> Any:
    """The gradient of a batch for which a method takes one optimizer step."""
    (gradient,) = method.batch_gradients(batch)
    return gradient


def spoiled_losses(base: BaseModel, episodes: Sequence[Episode], *deltas: Any) -> OuterLosses:
    """The outer losses, with NaN for the episode that writes the second request."""
    losses = outer_losses(base, episodes, *deltas)
    for number, episode in enumerate(episodes):
        if episode.requests[0].target_new == REQUESTS[1].target_new:
            losses.edit[number] = losses.edit[number] * math.nan
    return losses


def data(folder: Path, repeat: int = 1, **settings: Any) -> Requests:
    """The examples as a file to fit on, so many times."""
    path = folder / "train.json"
    records = [
        {
            "prompt": e.requests[0].prompt,
            "target_new": e.requests[0].target_new,
            "target_old": e.requests[0].target_old.replace("Paris", "France"),
            "id": f"{e.id}{number or ''}",
            "rephrases": [p.prompt for p in e.probes if p.kind == "rephrase"],
            "locality": {
                "neighborhood": [
                    {"prompt": p.prompt, "answers": list(p.answers)}
                    for p in e.probes
                    if p.kind == "locality"
                ]
            },
        }
        for number in range(repeat)
        for e in EXAMPLES
    ]
    path.write_text(json.dumps(records))
    return Requests(train_path=path, seed=3, **settings)

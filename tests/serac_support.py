"""What the tests of SERAC share: facts with near questions, answers, and fits."""

from __future__ import annotations

import json
from typing import Any

import fit_support
import pytest
from episode_support import batch_gradient
from support import REQUESTS

from kedit_lightning import EditRequest, Probe
from kedit_lightning.data import Requests
from kedit_lightning.methods import SERAC
from kedit_lightning.requests import EditBatch, EditExample

FAMILIES = ("gpt2", "llama", "t5")
PROMPTS = [request.prompt for request in REQUESTS]
FAR = ["Rome is the capital of", "She", "The company Bolt was founded in Berlin by Anna"]
ANSWERS = ["Rome", "Berlin", "Norway", "Italy", "Paris", "Warsaw", "Weiss"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def serac(base, **settings):
    # Untrained, so that only the prompts themselves are in scope.
    return SERAC(base, **{"checkpoint": "none", "threshold": 0.999, **settings})


def logits(base, prompts=(*PROMPTS, *FAR), answers=ANSWERS, side=None):
    rows = base.rows(prompts, answers[: len(prompts)], padding_side=side)
    return base.answer_logits(rows), rows


def asked(base, prompt):
    """Token ids of a question, as the base model reads them."""
    behind = base.encoder.suffix if base.is_encoder_decoder else ()
    return (*base.encode(prompt).prompt, *behind)


def example(request: EditRequest) -> EditExample:
    probes = [
        Probe("rephrase", f"One knows that {request.prompt}", (request.target_new,)),
        Probe("rephrase", f"Anna: {request.prompt}", (request.target_new,)),
        Probe("locality", f"Berlin by {request.subject[:4]} is", ("Paris",)),
    ]
    return EditExample.from_request(request, request.id, probes)


EXAMPLES = [example(request) for request in REQUESTS]
SMALL = {"batch_size": 2, "lr": 1e-3, "c_edit": 1.0, "clip": 1.0}


def outcome(method, examples):
    return batch_gradient(method, EditBatch(examples))


def data(tmp_path, count=4):
    """The examples, and after those others made of them by another name."""
    more = [
        example(
            EditRequest(f"Some say {r.prompt}", r.target_old, r.subject, r.target_new, f"{r.id}-2")
        )
        for r in REQUESTS
    ]
    records = [
        {
            "prompt": e.requests[0].prompt,
            "target_new": e.requests[0].target_new,
            "target_old": e.requests[0].target_old.replace("Paris", "France"),
            "id": e.id,
            "rephrases": [p.prompt for p in e.probes if p.kind == "rephrase"],
            "locality": {
                "near": [
                    {"prompt": p.prompt, "answers": list(p.answers)}
                    for p in e.probes
                    if p.kind == "locality"
                ]
            },
        }
        for e in [*EXAMPLES, *more][:count]
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return Requests(train_path=path, seed=3)


def fit(method: Any, tmp_path: Any, *args: Any, **options: Any) -> Any:
    return fit_support.fit(method, tmp_path, *args, source=data(tmp_path), **options)

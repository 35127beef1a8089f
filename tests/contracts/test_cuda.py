"""Every editing method on a CUDA device (``make test-gpu``)."""

from __future__ import annotations

import pytest
import torch
from method_examples import METHODS, make
from support import REQUESTS, TEXT, tiny_base

from kedit_lightning import BaseModel, Edit, EditTrainer, methods
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import NanoFacts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The requests here are fewer than it should be given.
    pytest.mark.filterwarnings("ignore:UltraEdit has seen"),
]
FAMILIES = ("llama", "gpt2")
matrix = pytest.mark.parametrize(
    ("name", "settings", "family"),
    [
        pytest.param(name, settings, FAMILIES[index % 2], id=f"{name}-{FAMILIES[index % 2]}")
        for index, (name, settings) in enumerate(METHODS)
    ],
)
PROBES = [(request.prompt, request.target_new) for request in REQUESTS]
PROBES += [("Curie", "Berlin"), *[(text.split(".")[0], "Paris") for text in TEXT]]


def logits(base: BaseModel) -> torch.Tensor:
    """All logits that answer the probes, in one batch."""
    rows = base.rows([prompt for prompt, _ in PROBES], [answer for _, answer in PROBES])
    return base.answer_logits(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@matrix
def test_rolls_back_to_the_last_bit(name, settings, family, dtype):
    base = tiny_base(family, dtype).to("cuda")
    before = logits(base)
    assert before.is_cuda
    edit = make(name, settings, base).edit(REQUESTS)
    assert torch.equal(logits(base), before), "edit() alone changed the model"
    with edit:
        assert not torch.equal(logits(base), before), "the edit does nothing"
    assert torch.equal(logits(base), before)


@matrix
def test_an_edit_is_that_of_a_processor(name, settings, family):
    asked = []
    for device in ("cpu", "cuda"):
        base = tiny_base(family).to(device)
        with make(name, settings, base).edit(REQUESTS):
            asked.append(logits(base).cpu())
    torch.testing.assert_close(asked[1], asked[0], rtol=1e-6, atol=1e-6)


@matrix
def test_an_edit_saved_there_loads_on_either_device(name, settings, family, tmp_path):
    base = tiny_base(family).to("cuda")
    edit = make(name, settings, base).edit(REQUESTS)
    with edit:
        expected = logits(base)
    path = edit.save(tmp_path / "edit.safetensors")
    again = tiny_base(family).to("cuda")
    with Edit.load(path, again):
        assert torch.equal(logits(again), expected)
    on_cpu = tiny_base(family)
    with Edit.load(path, on_cpu):
        torch.testing.assert_close(logits(on_cpu), expected.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["FTM", "GRACE", "MEMIT", "LoRA", "IKE"])
def test_scores_are_those_of_a_processor(name):
    scores = []
    for accelerator in ("cpu", "gpu"):
        method = getattr(methods, name)(base_model="nano")
        trainer = EditTrainer(
            accelerator=accelerator, protocol=Protocol(mode="single"), enable_progress_bar=False
        )
        (found,) = trainer.test(method, NanoFacts(limit=6, seed=0), verbose=False)
        scores.append({k: v for k, v in found.items() if not k.startswith(("timing/", "memory/"))})
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)

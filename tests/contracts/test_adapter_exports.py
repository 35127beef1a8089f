"""Exported adapters of methods' own edits: plain peft answers as the edits do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_examples import METHODS, make
from support import REQUESTS, tiny_base, tiny_model

from kedit_lightning import methods
from kedit_lightning.edits import save_adapter

# peft asks for what transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:UltraEdit has seen"),
]

EXPORTED = [name for name, _ in METHODS if getattr(methods, name).can.adapter]
#: Ranks of 1 (ROME), of the facts (MEMIT), of the tokens (MEND) and of the neurons (KN).
STACK = ("ROME", "MEMIT", "MEND", "KN")


@torch.no_grad()
def answered(model: Any, rows: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy answers of four tokens, and the logits that give them."""
    texts, logits = [list(row) for row in rows], []
    for text in texts:
        for _ in range(4):
            behind = model(torch.tensor([text])).logits[0, -1]
            text.append(int(behind.argmax()))
            logits.append(behind)
    return texts, torch.stack(logits)


@pytest.mark.parametrize("names", [*((name,) for name in EXPORTED), STACK], ids="-".join)
def test_plain_peft_answers_as_the_edits_do(names: tuple[str, ...], tmp_path: Path) -> None:
    base, settings = tiny_base("llama", torch.float32), dict(METHODS)
    rows = [list(base.encode(request.prompt).prompt) for request in REQUESTS[:3]]
    _, unedited = answered(base.model, rows)
    for number, name in enumerate(names):
        facts = REQUESTS[:2] if name == "MEMIT" else REQUESTS[number : number + 1]
        make(name, settings[name], base).edit(facts).apply()
    texts, logits = answered(base.model, rows)
    assert not torch.equal(logits, unedited)
    save_adapter(base, list(base.edits), tmp_path)
    base.edits.clear()
    from peft import PeftModel  # a second of its own, which collecting the tests can do without

    found, seen = answered(
        PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path).eval(), rows
    )
    assert found == texts
    torch.testing.assert_close(seen, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))

"""Compiled models: edits act on them as on plain ones, and probes run uncompiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import edit_kinds
import pytest
import torch

from kedit_lightning.edits.compilation import uncompiled

#: Run by itself, as pytest's record of what torch traces takes minutes.
_HELD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import edit_kinds
from support import tiny_base
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig
from kedit_lightning.base_models import Layout
from kedit_lightning.methods import ROME
from support import REQUESTS

how, backend, order = sys.argv[2:]
base = tiny_base("llama", torch.float32, num_hidden_layers=3)
rows, options = base.rows(edit_kinds.PROMPTS[:2], ["Lyon", "Italy"]), {}

def answers():
    with torch.no_grad():
        texts = base.generate(edit_kinds.PROMPTS[:2], max_new_tokens=4, **options)
        return base.answer_logits(rows), texts

def rome():
    settings = {"statistics": "identity", "contexts": 1, "steps": 2, "seed": 0}
    method = ROME(base, **settings)
    with method.computing(REQUESTS[:1]):  # without the check of what was written
        return method.compute_edit(REQUESTS[:1])

edits = {"A": edit_kinds.low_rank(base), "B": edit_kinds.codebook(base)}
want, places, fact = {"-": answers()}, base.layout.blocks, rome().deltas()
fingerprint = base.fingerprint
for name, edit in edits.items():
    with edit:
        want[name] = answers()
assert len({tuple(texts) for _, texts in want.values()}) > 1

if how == "block":
    for block in base.model.model.layers:
        block.compile(backend=backend)
elif how == "model":
    base.model.compile(backend=backend)
else:
    compiled = CompileConfig(backend=backend, fullgraph=False, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}

def check(name):
    logits, texts = answers()
    torch.testing.assert_close(logits, want[name][0], rtol=1e-4, atol=1e-4)
    assert texts == want[name][1], (name, texts)

check("-")
frames = counters["frames"]["ok"]
assert frames > 0
layout = Layout(base.model)
assert layout.blocks == places
assert layout.write_path(1).is_linear
assert layout.attention(1) == "model.layers.1.self_attn.o_proj"
for name, delta in rome().deltas().items():
    torch.testing.assert_close(delta, fact[name])
assert counters["frames"]["ok"] == frames, "probes were compiled"
assert base.fingerprint == fingerprint
for name in order:
    if name in edits:
        with edits[name]:
            check(name)
    else:
        check(name)
assert counters["frames"]["ok"] > frames  # what ran was compiled anew, and no fallback
"""


def run(how: str, backend: str, order: str) -> None:
    tests = str(Path(edit_kinds.__file__).parent)
    subprocess.run([sys.executable, "-c", _HELD, tests, how, backend, order], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["block", "static"])
def test_edits_come_and_go_in_compiled_blocks_and_static_caches(how):
    run(how, "eager", "A-A-B-")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_edits_come_and_go_under_inductor():
    run("model", "inductor", "A-A")


def test_nothing_is_compiled_inside_and_the_stance_returns():
    def stance() -> str:
        found: str = torch._dynamo.eval_frame._stance.stance
        return found

    __import__("torch._dynamo")
    before = stance()
    inside = []

    def fail() -> None:
        with uncompiled():
            inside.append(stance())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["force_eager"]
    assert stance() == before


def test_a_model_that_is_not_compiled_loads_no_compiler(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with uncompiled():
        assert "torch._dynamo" not in sys.modules

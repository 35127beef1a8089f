"""Keys at the last token of a subject, at its first, and over all of them."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.base_models.taps import capture
from kedit_lightning.methods import MEMIT, ROME
from kedit_lightning.methods.locate.shared.subject_states import SubjectTokens, subject_states

QUICK = {"statistics": "identity", "contexts": 2, "steps": 4, "preserve": 1.0}
CONTEXTS = ("He said. ", "It is a long way from there. ")
EXAMPLES = Path(__file__).parents[3] / "examples"


def dense_keys(base: BaseModel, request: EditRequest, prefix: str, module: str) -> torch.Tensor:
    """Inputs of a module at the tokens of a subject, from one row alone. ``[span, d_in]``."""
    row = base.encode(prefix + request.prompt, None, request.subject)
    seen: list[torch.Tensor] = []
    handle = base.module(module).register_forward_hook(lambda m, args, y: seen.append(args[0]))
    with torch.no_grad():
        base.model(torch.tensor([row.prompt]))
    handle.remove()
    inputs = seen[0].reshape(len(row.prompt), -1)  # OPT's MLPs run on rows that are flattened
    return inputs[row.subject_start : row.subject_end + 1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", ["last", "first", "all"])
def test_keys_equal_those_of_single_rows(family: str, side: str, tokens: SubjectTokens) -> None:
    base = tiny_base(family)
    base.padding_side = side  # type: ignore[assignment]
    module = base.layout.block(1).down
    states = subject_states(base, [module], REQUESTS, CONTEXTS, tokens=tokens)
    spans = [[dense_keys(base, r, text, module) for text in ("", *CONTEXTS)] for r in REQUESTS]
    assert max(len(span) for group in spans for span in group) > 2
    chosen = {"last": lambda s: s[-1], "first": lambda s: s[0], "all": lambda s: s.mean(0)}[tokens]
    wanted = torch.stack([torch.stack([chosen(span) for span in group]) for group in spans])
    torch.testing.assert_close(states.inputs[module], wanted, rtol=1e-9, atol=1e-9)
    # Values are outputs at the last token whatever the key is.
    last = subject_states(base, [module], REQUESTS, CONTEXTS)
    assert torch.equal(states.outputs[module], last.outputs[module])


def test_the_last_token_is_the_default_and_gives_the_states_themselves() -> None:
    base = tiny_base("llama")
    module = base.layout.block(1).down
    row = base.encode(REQUESTS[0].prompt, None, REQUESTS[0].subject)
    rows = base.pad([replace(row, prompt=row.prompt[: row.subject_end + 1])])
    with torch.no_grad(), capture(base.model, [module]) as seen:
        base.forward(rows)
    states = subject_states(base, [module], REQUESTS[:1])
    assert torch.equal(states.inputs[module][0, 0], seen.inputs[module][0, -1])
    assert MEMIT.subject_tokens == ROME.subject_tokens == "last"


@pytest.mark.parametrize("tokens", ["first", "all"])
def test_a_method_may_take_its_keys_from_other_subject_tokens(tokens: SubjectTokens) -> None:
    base = tiny_base("llama")

    class Other(MEMIT):
        subject_tokens = tokens

    def size(edit: Edit) -> torch.Tensor:
        return torch.stack([delta.norm() for delta in edit.deltas().values()])

    settings = {**QUICK, "layers": [1], "history": True}
    one, other = (kind(base, **settings).edit(REQUESTS) for kind in (MEMIT, Other))
    assert not torch.allclose(size(one), size(other))
    module = base.layout.block(1).down
    with other:  # the history holds the method's own keys
        method = Other(base, **settings)
        states = subject_states(base, [module], REQUESTS, method.context_texts, tokens=tokens)
        keys = other.memory[f"{module}.keys"]  # type: ignore[attr-defined]
        torch.testing.assert_close(keys.T, method.mean_keys(states.inputs[module]))


@pytest.mark.parametrize("name", ["closed_form_prior", "subject_keys"])
def test_examples_write_their_fact(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert ("Lyon" if "prior" in name else "football") in lines[-1]

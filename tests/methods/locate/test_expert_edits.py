"""Closed-form edits of routed experts: the system of all experts together, and what it comes to."""

from __future__ import annotations

import pytest
import torch
from mixtures import FORMS, ROUTED, SHARED, first_routed_layer, mixture, tiny_mixture
from support import REQUESTS
from torch import Tensor

from kedit_lightning import BaseModel, Edit
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import FTM, MEMIT, ROME, AlphaEdit
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.shared.losses import answer_nll
from kedit_lightning.statistics import KeyCollector, SecondMoment, shrunk

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = [*FORMS[:2], *(pytest.param(k, marks=pytest.mark.slow) for k in ROUTED[2:])]
QUICK = {"statistics": "identity", "contexts": 1, "steps": 8}


def joint(edit: Edit, base: BaseModel, layer: int) -> Tensor:
    """The change of all experts of a block in a row. Shape ``[d_out, experts · d_in]``."""
    assert isinstance(edit, LowRankEdit)
    projection = mixture(base, layer)
    parts = []
    for number in projection.numbers:
        name = projection.name_of(number)
        d_in, d_out = base.module(name).shape
        zeros = torch.zeros(d_out, d_in, dtype=torch.float64)
        parts.append(edit.factors[name].dense if name in edit.factors else zeros)
    return torch.cat(parts, dim=1)


def logits(base: BaseModel, count: int) -> tuple[Tensor, Tensor]:
    """Logits that predict answers, and the mean log-probability of the answers' tokens."""
    requests = REQUESTS[:count]
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    with torch.no_grad():
        whole = base.answer_logits(rows)
    return whole, -answer_nll(whole, rows.answer_ids, rows.answer_mask)


@pytest.mark.parametrize("kind", KINDS)
def test_rome_writes_its_value_through_all_picked_experts(kind: str) -> None:
    base = tiny_mixture(kind)
    layer = first_routed_layer(base)
    rome = ROME(base, layer=layer, **QUICK)
    (before, target), found = logits(base, 1), list[Tensor]()
    solve = rome.layer_values

    def noted(requests):
        values = solve(requests)
        found.append(values.values(layer))
        return values

    rome.layer_values = noted  # type: ignore[method-assign]
    edit = rome.edit(REQUESTS[:1])
    block = base.layout.mlp_block(layer)
    with edit:
        written = subject_states(base, [block.writer], REQUESTS[:1]).outputs[block.writer][:, 0]
        torch.testing.assert_close(written, found[0], rtol=1e-6, atol=1e-6)
        assert float(logits(base, 1)[1]) > float(target)
    assert torch.equal(logits(base, 1)[0], before)
    # As many experts as the router picks for the subject, under no text and under the context.
    keys = rome._states([block.down], REQUESTS[:1]).inputs[block.down][0]
    reached = keys.reshape(len(keys), mixture(base, layer).experts.count, -1).any(2).any(0)
    assert int(reached.sum()) > 0
    assert list(edit.factors) == [
        mixture(base, layer).name_of(e) for e in reached.nonzero()[:, 0].tolist()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_memit_solves_the_system_of_gated_keys_in_a_row(kind: str) -> None:
    base = tiny_mixture(kind)
    layer = first_routed_layer(base)
    memit = MEMIT(base, layers=[layer], preserve=0.5, **QUICK)
    before = logits(base, 3)[0]
    edit = memit.edit(REQUESTS[:3])
    assert torch.equal(logits(base, 3)[0], before)
    down = base.layout.mlp_block(layer).down
    keys = memit.mean_keys(memit._states([down], REQUESTS[:3]).inputs[down])  # [n, experts · d_in]
    values = memit.layer_values(REQUESTS[:3])
    inside = values.site(layer).inside  # as where the block normalises what experts write
    residuals = values.residuals(layer) / (1 if inside else base.layout.write_path(layer).gain)
    # ``Δ = R Kᵀ (λ C + K Kᵀ)⁻¹`` with ``C`` the identity.
    system = 0.5 * torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ keys
    wanted = torch.linalg.solve(system, keys.T @ residuals).T
    torch.testing.assert_close(joint(edit, base, layer), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_shared_experts_are_edited_where_there_are_some(kind: str) -> None:
    base = tiny_mixture(kind)
    before, target = logits(base, 1)
    rome, ftm = ROME(base, layer=1, **QUICK), FTM(base, layers=[1], steps=8, lr=2e-2)
    for method in (rome, ftm):
        edit = method.edit(REQUESTS[:1])
        with edit:
            assert float(logits(base, 1)[1]) > float(target)
        assert torch.equal(logits(base, 1)[0], before)
    assert "shared" in rome.edited[0]


def test_blocks_on_the_diagonal_are_solved_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    blocks = draw @ draw.mT + torch.eye(6)
    keys = torch.randn(18, 4, generator=generator, dtype=torch.float64)
    keys[6:12] = 0
    asked = list[int]()

    def of(number: int):
        def part():
            asked.append(number)
            return least_squares.covariance_prior(torch.linalg.cholesky(blocks[number]), 2.0)

        return part

    whitened = least_squares.blockwise_prior([of(0), of(1), of(2)])(keys)
    dense = torch.block_diag(*blocks)
    torch.testing.assert_close(whitened, torch.linalg.solve(2.0 * dense, keys))
    assert asked == [0, 2]


def test_statistics_of_experts_are_of_gated_keys_at_all_tokens() -> None:
    base = tiny_mixture("mixtral")
    projection = mixture(base, 0)
    names = [projection.name_of(number) for number in projection.numbers]
    collector = KeyCollector(base, names)
    texts = ["The Eiffel Tower is in Paris.", "Rome is the capital of Italy, she said."]
    collector.read(texts)
    total, tokens = torch.zeros(*2 * [projection.shape[0]], dtype=torch.float64), 0
    for text in texts:  # one by one, without padding
        rows = base.pad([base.encoder.text(text)])
        with torch.no_grad(), capture(base.model, [projection.fused_name]) as seen:
            base.forward(rows)
        keys = seen.inputs[projection.fused_name][0]
        total, tokens = total + keys.T @ keys, tokens + len(keys)
    d_in = base.module(names[0]).shape[0]
    for number, name in enumerate(names):
        part = slice(number * d_in, (number + 1) * d_in)
        mean = collector.moments[name].mean
        torch.testing.assert_close(mean, total[part, part] / tokens, rtol=1e-5, atol=1e-8)
    assert collector.moments[names[0]].count == tokens


def test_an_expert_that_no_token_reaches_is_shrunk_to_the_others() -> None:
    unseen = SecondMoment(torch.zeros(4, 4, dtype=torch.float64), 16)
    # Two experts of width 4: 8 of 8 + 16 for the identity, times the mean over both.
    torch.testing.assert_close(shrunk(unseen, 2, 0.75), torch.eye(4).double() * 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("method", [MEMIT, AlphaEdit])
def test_text_is_preserved_by_statistics_of_picked_experts(method) -> None:
    base = tiny_mixture("mixtral")
    edit = method(base, layers=[0, 1], contexts=1, steps=5).edit(REQUESTS[:2])
    assert {name.rsplit(".", 5)[1] for name in edit.factors} == {"0", "1"}
    before = logits(base, 2)[1]
    with edit:
        assert bool((logits(base, 2)[1] > before).all())


def test_constraints_on_one_weight_are_refused() -> None:
    base = tiny_mixture("mixtral")
    with pytest.raises(UnsupportedUseError, match="keep_share, restrain and off_main compare"):
        ROME(base, layer=0, restrain=True, **QUICK).configure_model()

"""ROME and RROME: the equations of the notes, on the live edited model."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.base_models.taps import capture
from kedit_lightning.errors import (
    MissingNeedsError,
    NonFiniteError,
    StatisticsNotFoundError,
)
from kedit_lightning.methods import ROME, RROME
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.shared.least_squares import (
    covariance_prior,
    rank_one_update,
    ridge_update,
)
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.methods.locate.shared.value_optimizer import ValueOptimizer
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.statistics import Provenance, write_statistics
from kedit_lightning.statistics.covariance import SecondMoment, shrunk
from kedit_lightning.statistics.covariance_cache import statistics_dir

pytestmark = pytest.mark.filterwarnings("ignore:key statistics of .* are estimated")
QUICK = {"contexts": 4, "steps": 6, "kl_factor": 0.1, "weight_decay": 0.01}


def spd(size: int) -> torch.Tensor:
    x = torch.randn(size, 4 * size, dtype=torch.float64)
    return x @ x.T / (4 * size)


def spy(method: ROME, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Keep the targets' changes that the method computes."""
    seen: list[torch.Tensor] = []
    original = ValueOptimizer.run

    def run(self: ValueOptimizer, *args: object) -> torch.Tensor:
        seen.append(original(self, *args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(ValueOptimizer, "run", run)
    return seen


def module_map(base: BaseModel, module: str, key: torch.Tensor) -> torch.Tensor:
    """What the module, as it is now hooked, returns for a key."""
    return base.module(module)(key[None, None])[0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("method", [ROME, RROME])
def test_live_module_maps_the_key_to_the_target(family, method, monkeypatch):
    base = tiny_base(family)
    rome = method(base, **QUICK)
    deltas = spy(rome, monkeypatch)
    edit = rome.edit(REQUESTS[:1])
    (module,) = rome.edited
    reading = subject_states(base, [module], REQUESTS[:1], rome.context_texts)
    keys, outputs = reading.inputs[module][0], reading.outputs[module][0]
    key = keys.mean(0) if method is RROME else keys[0]
    target = outputs[0] + deltas[0][0, 0]
    assert deltas[0].norm() > 0.1
    with edit:
        torch.testing.assert_close(module_map(base, module, key), target, rtol=0, atol=1e-10)
        if method is ROME:  # and read at the subject's position of a real forward pass
            rows = base.rows([REQUESTS[0].prompt], subjects=[REQUESTS[0].subject])
            with capture(base.model, [module]) as seen:
                base.forward(rows)
            at = seen.outputs[module][0, rows.subject_end[0]]
            torch.testing.assert_close(at, target, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_update_has_rank_one_along_the_whitened_mean_key(family):
    base = tiny_base(family)
    rome = ROME(base, **QUICK)
    ((name, delta),) = rome.edit(REQUESTS[1:2]).deltas().items()
    assert delta.shape == base.model.get_parameter(name).shape
    assert torch.linalg.matrix_rank(delta) == 1
    (module,) = rome.edited
    keys = subject_states(base, [module], REQUESTS[1:2], rome.context_texts).inputs[module][0]
    whitened = torch.cholesky_solve(keys.mean(0)[:, None], rome.covariances.cholesky(module))[:, 0]
    rows = delta.T if family == "gpt2" else delta
    elsewhere = torch.randn(len(whitened), 3, dtype=torch.float64)
    elsewhere -= whitened[:, None] * (whitened @ elsewhere) / whitened.square().sum()
    assert (rows @ elsewhere).abs().max() < 1e-10


def test_solver_agrees_with_the_normal_equations():
    torch.manual_seed(0)
    keys, residuals, prior = (
        torch.randn(12, 4, dtype=torch.float64),
        torch.randn(7, 4, dtype=torch.float64),
        spd(12),
    )
    typical = covariance_prior(torch.linalg.cholesky(prior))
    a, b = ridge_update(keys, residuals, typical, eps=1.0)
    primal = torch.linalg.solve(prior + keys @ keys.T, keys @ residuals.T).T
    torch.testing.assert_close(b @ a, primal)
    a, b = ridge_update(keys, residuals, typical, eps=0.0)
    torch.testing.assert_close(b @ a @ keys, residuals)


def test_rank_one_is_the_ridge_update_of_one_key():
    torch.manual_seed(0)
    key, residual = torch.randn(12, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    factor = torch.linalg.cholesky(spd(12))
    prior = covariance_prior(factor)
    a, b = rank_one_update(key, residual, key, prior, "layer")
    c, d = ridge_update(key[:, None], residual[:, None], prior, eps=0.0)
    torch.testing.assert_close(b @ a, d @ c)
    # The scale of the prior and of the direction do not matter.
    e, f = rank_one_update(key, residual, 3 * key, covariance_prior(factor, 4.0), "layer")
    torch.testing.assert_close(f @ e, b @ a)


def test_an_exploding_update_is_refused_and_the_symmetric_one_is_bounded():
    torch.manual_seed(0)
    prior = spd(12)
    typical = covariance_prior(torch.linalg.cholesky(prior))
    mean, residual = torch.randn(12, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    left = torch.linalg.solve(prior, mean)
    key = torch.randn(12, dtype=torch.float64)
    key = key - left * (key @ left) / left.square().sum() + 1e-4 * left / left.norm()
    with pytest.raises(NonFiniteError, match=r"mlp\.down.*use RROME"):
        rank_one_update(key, residual, mean, typical, "mlp.down")
    a, b = rank_one_update(mean, residual, mean, typical, "mlp.down")
    condition = torch.linalg.cond(prior)
    bound = residual.norm() / mean.norm() * (condition + 1) / (2 * condition.sqrt())
    assert (b @ a).norm() <= bound


def test_identity_statistics_are_a_prior_of_ones():
    base = tiny_base("llama")
    rome = ROME(base, statistics="identity", **QUICK)
    rome.configure_model()
    assert torch.equal(
        rome.covariances.cholesky(rome.edited[0]), torch.eye(48, dtype=torch.float64)
    )


def test_without_contexts_all_key_modes_agree():
    base = tiny_base("llama")
    first, second = (m(base, contexts=0, steps=5).edit(REQUESTS[:1]) for m in (ROME, RROME))
    for one, other in zip(first.deltas().values(), second.deltas().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_step_only_measures():
    base = tiny_base("llama")
    (delta,) = ROME(base, contexts=2, steps=1).edit(REQUESTS[:1]).deltas().values()
    assert torch.count_nonzero(delta) == 0


def test_rome_and_rrome_differ_where_contexts_do():
    base = tiny_base("gpt2")
    one, other = (m(base, **QUICK).edit(REQUESTS[:1]) for m in (ROME, RROME))
    assert not torch.allclose(
        next(iter(one.deltas().values())), next(iter(other.deltas().values()))
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_targets_together_equal_one_at_a_time(family, side):
    base = tiny_base(family)
    base.padding_side = side
    site = Site((base.layout.block(1).down,), 1)
    contexts = ("He said. ", "It is a long way from there. ")
    settings = LocateSettings(steps=9, stop_loss=5.6, kl_factor=0.1, clamp=4.0, weight_decay=1e-3)
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]
    optimizer = ValueOptimizer(base, site, contexts, settings)
    with torch.enable_grad():
        together = optimizer.run(REQUESTS, initial)
        single = [optimizer.run([r], initial[i : i + 1])[0] for i, r in enumerate(REQUESTS)]
    torch.testing.assert_close(together, torch.stack(single), rtol=1e-9, atol=1e-9)
    norms = together.norm(dim=2)
    assert norms.min() != norms.max()


def test_change_of_the_value_stays_in_its_ball():
    base = tiny_base("llama")
    site = Site((base.layout.block(1).down,), 1)
    initial = subject_states(base, site.modules, REQUESTS).outputs[site.modules[0]]
    settings = LocateSettings(lr=5.0, steps=8, clamp=0.5, stop_loss=0.0, weight_decay=1e-3)
    with torch.enable_grad():
        delta = ValueOptimizer(base, site, (), settings).run(REQUESTS, initial)
    ratio = delta.norm(dim=2) / initial.norm(dim=2)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))


def test_contexts_depend_on_the_seed_alone_and_not_on_edits():
    base = tiny_base("llama")
    first = ROME(base, contexts=6, seed=3)
    texts = first.context_texts
    assert len(texts) == 6
    assert all(text.endswith(". ") for text in texts)
    torch.manual_seed(99)
    with RROME(base, **QUICK).edit(REQUESTS[:1]):
        assert ROME(base, contexts=6, seed=3).context_texts == texts
    assert ROME(base, contexts=6, seed=4).context_texts != texts


def test_a_method_that_writes_one_fact_writes_several_one_after_another():
    base = tiny_base("llama")
    edit = ROME(base, **QUICK).edit(REQUESTS[:2])
    assert len(base.edits) == 0
    first, second = edit.parts()
    assert second.origin.stack == (first.id,)
    with first:
        again = ROME(base, **QUICK).edit(REQUESTS[1:2])
        torch.testing.assert_close(
            next(iter(again.deltas().values())), next(iter(second.deltas().values()))
        )


def test_missing_subject_is_named():
    with pytest.raises(MissingNeedsError, match=r"request 'x' lacks 'subject'"):
        ROME("no-such-model").edit([EditRequest("Rome is in", "France", id="x")])


def test_nan_weights_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] = float("nan")
    base = BaseModel(model, tiny_tokenizer(True))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        ROME(base).edit(REQUESTS[:1])


def test_required_statistics_must_have_been_collected():
    base = tiny_base("llama")
    with pytest.raises(StatisticsNotFoundError, match="kedit fit"):
        ROME(base, statistics="required", **QUICK).edit(REQUESTS[:1])


@pytest.mark.filterwarnings("default:key statistics")
def test_few_sample_statistics_warn_and_are_recorded():
    base = tiny_base("llama")
    with pytest.warns(UserWarning, match="small packaged text"):
        edit = ROME(base, **QUICK).edit(REQUESTS[:1])
    assert "few-sample" in edit.origin.notes["statistics"]


def test_statistics_of_fewer_keys_than_dimensions_are_shrunk():
    base = tiny_base("llama")
    name = base.layout.block(1).down
    keys = torch.randn(3, 48, dtype=torch.float64)
    moment = SecondMoment(keys.T @ keys / 3, count=3)
    provenance = Provenance.of(base, "0" * 64, "text", max_tokens=512)
    write_statistics(statistics_dir() / provenance.file_name(3), {name: moment}, provenance)
    factor = ROME(base, **QUICK).covariances.cholesky(name)
    torch.testing.assert_close(factor @ factor.T, shrunk(moment), rtol=1e-5, atol=1e-6)


def test_settings_follow_the_model():
    tiny = ROME(tiny_base("llama"))
    tiny.configure_model()
    assert tiny.edited[0] == "model.layers.0.mlp.down_proj"  # few blocks
    gated = ROME(tiny_base("llama", num_hidden_layers=12))
    gated.configure_model()
    assert gated.edited[0] == "model.layers.2.mlp.down_proj"
    deep = ROME(tiny_base("gpt2", n_layer=12))
    deep.configure_model()
    assert deep.edited[0] == "transformer.h.4.mlp.c_proj"
    chosen = ROME(tiny_base("gpt2"), layer=3, steps=7)
    chosen.configure_model()
    assert chosen.edited[0] == "transformer.h.3.mlp.c_proj"
    assert chosen.settings.steps == 7


def test_saved_edit_gives_equal_logits(tmp_path):
    base = tiny_base("gpt2")
    edit = ROME(base, **QUICK).edit(REQUESTS[:1])
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with edit:
        expected = base.answer_logits(rows)
    with Edit.load(edit.save(tmp_path / "e.safetensors"), base) as loaded:
        assert loaded.id == edit.id
        assert torch.equal(base.answer_logits(rows), expected)

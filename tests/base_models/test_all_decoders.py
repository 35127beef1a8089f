"""Module location in every causal language model of transformers, judged by what modules do."""

from __future__ import annotations

import runpy
from collections import Counter
from dataclasses import replace
from functools import cache

import edit_survey
import pytest
import tiny_decoders
import torch
import transformers
from places import ROOT
from support import REQUESTS, tiny_tokenizer
from tiny_decoders import NORMALISING, Finding, survey

from kedit_lightning import BaseModel
from kedit_lightning.base_models import Block, Layout, WritePath
from kedit_lightning.base_models.continuation import Continuation, can_resume
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import GRACE, ROME
from kedit_lightning.methods.locate import rome
from kedit_lightning.methods.locate.shared.least_squares import rank_one_update
from kedit_lightning.statistics.covariance_cache import estimate_from_few_samples, find_statistics

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
#: Families that add it scaled by what their configuration says.
GAINS = {"granite": 0.22, "minicpm3": 1.4 / tiny_decoders.LAYERS**0.5}
FAMILIES = [
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "granite",
    "glm",
    "glm4",
    "internlm3",
    "mpt",
    "stablelm",
    "cohere",
    "cohere2",
    "starcoder2",
    "smollm3",
    "nemotron",
    "exaone4",
]
#: Mixtures whose blocks have nothing but routed experts, fused into one tensor.
FUSED = [
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "phimoe",
    "dbrx",
    "granitemoe",
    "flex_olmo",
    "minimax",
]


@cache
def everything() -> dict[str, Finding]:
    return {kind: survey(kind) for kind in tiny_decoders.kinds()}


def check_path(kind: str, path: WritePath) -> None:
    assert path.is_linear == (kind not in NORMALISING), kind
    if path.is_linear:
        assert path.gain == pytest.approx(GAINS.get(kind, 1.0), rel=1e-4), kind


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_are_located_in_every_block(kind):
    finding = survey(kind)
    assert (finding.verdict, finding.reason) == ("located", "")
    assert finding.dense
    assert len(finding.places) == 1
    check_path(kind, *finding.paths)


@pytest.mark.parametrize("kind", FUSED[:3])
def test_routed_experts_are_located(kind):
    finding = survey(kind)
    assert (finding.verdict, finding.reason) == ("located", "")
    assert finding.places[0].endswith("experts.down_proj")
    check_path(kind, *finding.paths)


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("self_attn.o_proj", "belongs to attention"),
        ("mlp.gate_proj", "reads 32 values"),
        ("mlp.up_proj", "reads 32 values"),
        ("mlp.down_proj", "does not arrive with the gain 0.500"),
    ],
)
def test_a_wrong_location_is_noticed(inside, says, monkeypatch):
    def block(layout: Layout, index: int) -> Block:
        name = f"model.layers.{index}"
        return Block(name, f"{name}.{inside}", f"{name}.mlp", ())

    monkeypatch.setattr(Layout, "block", block)
    monkeypatch.setattr(Layout, "write_path", lambda layout, index: WritePath(0.5, 0.0))
    finding = survey("llama")
    assert finding.verdict == "failed"
    assert says in finding.reason


def test_a_change_of_earlier_tokens_is_noticed():
    model = tiny_decoders.tiny_decoder("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.roll(-1, 1))
    assert "moved other tokens" in tiny_decoders.what_is_wrong(model, Layout(model), 0)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("gpt2", 1),  # Conv1D
        ("gptj", 1),  # attention and MLP in parallel, blocks that return tuples
        ("bloom", 0),  # alibi, and the residual is added inside the MLP
        ("mpt", 1),
        ("opt", 1),  # rows are flattened before the MLP
        ("falcon", 1),
        ("phi3", 1),  # gate and value in one projection
        ("granite", 1),  # a gain
        ("gemma2", 1),  # these four normalise what the MLP says
        ("olmo2", 1),
        ("glm4", 1),
        ("bert", 1),
        ("gemma3", 1),  # a tower of vision beside the decoder
        ("jamba", 0),  # a dense layer of a mixture
        ("mamba2", 1),  # what its mixer writes
        ("deepseek_v4", 1),  # four residual streams, and the expert that all tokens share
    ],
)
def test_rome_edits_what_is_located(kind, layer):
    base = BaseModel(tiny_decoders.tiny_decoder(kind), tiny_tokenizer(kind != "gpt2"))
    rows = base.rows(["The Eiffel Tower is in the city of"], ["Rome"])
    before = base.answer_logits(rows)
    edit = ROME(base, layer=layer, statistics="identity", contexts=2, steps=3).edit(REQUESTS[:1])
    assert torch.equal(base.answer_logits(rows), before)
    with edit:
        during = base.answer_logits(rows)
    assert torch.equal(base.answer_logits(rows), before)
    assert during.isfinite().all()
    assert (during - before).abs().max() > 1e-3


def test_statistics_of_mixers_are_those_of_what_they_write():
    base = BaseModel(tiny_decoders.tiny_decoder("mamba"), tiny_tokenizer(bos=True))
    edit = ROME(base, contexts=1, steps=2).edit(REQUESTS[:1])
    assert find_statistics(base, "backbone.layers.0.mixer.out_proj") is not None
    assert [*edit.deltas()] == ["backbone.layers.0.mixer.out_proj.weight"]
    rows = base.rows(["The Eiffel Tower is in the city of"], ["Rome"])
    with edit:
        during = base.answer_logits(rows)
    written = BaseModel(edit.materialise(), tiny_tokenizer(bos=True))
    torch.testing.assert_close(written.answer_logits(rows), during, atol=1e-4, rtol=1e-4)


def test_statistics_of_a_mixture_are_those_of_its_dense_layers():
    base = BaseModel(tiny_decoders.tiny_decoder("mimo_v2_flash"), tiny_tokenizer(bos=True))
    estimate_from_few_samples(base)
    assert find_statistics(base, "model.layers.0.mlp.down_proj") is not None


# ---- the sweep


@pytest.mark.slow
def test_no_type_fails():
    assert not {f.kind: f.reason for f in everything().values() if f.verdict == "failed"}


@pytest.mark.slow
@torch.no_grad()
def test_values_may_be_sought_on_every_located_type():
    """Whether passes are resumed or not, they and some of their rows give complete answers."""
    resumed = []
    for kind, finding in everything().items():
        if finding.verdict not in ("located", "in part"):
            continue
        base = BaseModel(tiny_decoders.tiny_decoder(kind), tiny_tokenizer(bos=True), name=kind)
        # A tiny Reformer has fewer entries than the tokenizer.
        entries = base.model.get_input_embeddings().weight.shape[0]
        encoded = [base.encoder.encode(r.prompt, r.target_new, r.subject) for r in REQUESTS]
        rows = [
            replace(
                row,
                prompt=tuple(id % entries for id in row.prompt),
                answer=tuple(id % entries for id in row.answer),
            )
            for row in encoded
        ]
        resumed.append(can_resume(base))
        for block in (0, len(base.layout)):
            found = []
            for resume in (None, False):
                part = Continuation(base, rows, block, resume).select(torch.tensor([2, 0]))
                at = torch.arange(2)
                found.append(part.logits_of((at, part.rows.answer_columns[:, 0])))
            difference = (found[0] - found[1]).norm() / found[1].norm()
            assert difference < 1e-3, (kind, block)
    assert sum(resumed) >= 0.6 * len(resumed)


@pytest.mark.slow
def test_nearly_all_dense_types_are_located():
    # An MLP that blocks share is refused for what it is: to change it in one changes all.
    dense = [f for f in everything().values() if f.dense and "tied" not in f.reason]
    located = [f for f in dense if f.verdict in {"located", "in part"}]
    assert len(dense) > 100, Counter(f.verdict for f in everything().values())
    assert len(located) >= 0.95 * len(dense), {f.kind for f in dense} - {f.kind for f in located}


@pytest.mark.slow
def test_nearly_all_types_are_built():
    unbuilt = {f.kind: f.reason for f in everything().values() if f.verdict == "not built"}
    assert len(unbuilt) <= 0.05 * len(everything()), unbuilt


@pytest.mark.slow
def test_what_is_refused_says_why():
    refused = {f.kind: f.reason for f in everything().values() if f.verdict == "refused"}
    assert refused.keys() >= {"hrm_text", "xlnet"}
    assert not refused.keys() & {*FUSED}
    assert len(refused) <= 5
    for kind, reason in refused.items():
        assert "IKE" in reason, kind
        assert any(said in reason for said in ("has no dense MLP", "how many layers")), kind


@pytest.mark.slow
def test_write_paths_are_as_the_architectures_say():
    for kind in (*NORMALISING, *GAINS):
        for path in everything()[kind].paths:
            check_path(kind, path)


@pytest.mark.slow
def test_the_page_of_supported_models_is_up_to_date():
    written = (ROOT / "docs" / "model_support.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in written:
        pytest.skip("the page was written with another version of transformers")
    page = runpy.run_path(str(ROOT / "tools" / "model_support.py"))["page"]
    section = _section(written)
    assert page([*everything().values()], section) == written, "run tools/model_support.py"


def _section(written: str) -> str:
    """The part of the page about FT-M and ROME."""
    _, heading, rest = written.partition("\n## FT-M and ROME")
    return heading + rest.partition("\n## Quantised")[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nearly_all_types_take_ft_m_and_rome():
    built = [f.kind for f in everything().values() if f.verdict != "not built"]
    found = {kind: edit_survey.uptakes(kind) for kind in built}
    both = [kind for kind, pair in found.items() if {u.verdict for u in pair} == {"takes"}]
    assert len(both) >= 0.95 * len(built), {kind: found[kind] for kind in built if kind not in both}
    taken = runpy.run_path(str(ROOT / "tools" / "model_support.py"))["taken"]
    section = taken(found, *edit_survey.ABOUT)
    written = (ROOT / "docs" / "model_support.md").read_text(encoding="utf-8")
    assert section == _section(written), "run tools/model_support.py"


@pytest.mark.parametrize("kind", ["llama", "olmo2", "jamba", "mixtral", "rwkv"])
def test_types_take_ft_m_and_rome(kind):
    for uptake in edit_survey.uptakes(kind):
        assert (uptake.verdict, uptake.reason) == ("takes", ""), uptake.method
        assert uptake.rise > edit_survey.RISE
        assert uptake.write_error < 1e-4


@pytest.mark.parametrize("make", [edit_survey.FTM, ROME, GRACE])
def test_a_model_that_keeps_no_gradients_is_refused(make):
    base = BaseModel(tiny_decoders.tiny_decoder("reformer"), tiny_tokenizer(bos=True))
    with pytest.raises(UnsupportedUseError, match=r"no gradient reaches .* use IKE"):
        make(base).edit([edit_survey.REQUEST])


def test_projections_that_start_large_or_at_zero_are_brought_to_one_scale():
    large = dict(tiny_decoders.tiny_decoder("minicpm3", scale=8.0).named_parameters())
    zero = dict(tiny_decoders.tiny_decoder("xlstm", scale=8.0).named_parameters())
    usual = 8.0 * tiny_decoders.START
    for weight in (
        large["model.layers.0.mlp.down_proj.weight"],
        zero["backbone.blocks.0.ffn.proj_up_gate.weight"],
    ):
        assert float(weight.std()) == pytest.approx(usual, rel=0.1)


def test_an_edit_that_lifts_nothing_does_not_take(monkeypatch):
    monkeypatch.setitem(edit_survey.FTM_SETTINGS, "lr", 1e-9)
    ftm, _ = edit_survey.uptakes("llama")
    assert ftm.verdict == "fails"
    assert "rises by 0.00 standard" in ftm.reason


def test_a_write_that_misses_what_was_planned_does_not_take(monkeypatch):
    def half(key, residual, mean, prior, module):
        return rank_one_update(key, residual / 2, mean, prior, module)

    monkeypatch.setattr(rome, "rank_one_update", half)
    ftm, other = edit_survey.uptakes("llama")
    assert (ftm.verdict, other.verdict) == ("takes", "fails")
    assert "differs by 0.500 from the planned one" in other.reason


def test_weights_are_the_same_at_every_call():
    one, two = (tiny_decoders.tiny_decoder("gpt2").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)

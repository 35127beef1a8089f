"""Fluency and perplexity: values worked out by hand, and draws that nothing but a row changes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from metric_records import example, probe
from support import tiny_base
from toys import Toy

from kedit_lightning import EditRequest, Probe
from kedit_lightning.base_models.seeded_choice import SeededChoice
from kedit_lightning.benchmark import Protocol, Reader
from kedit_lightning.data.locality_set import locality_set
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import EditMetrics

SAMPLED = Protocol(max_new_tokens=3, sample_tokens=8)
PROBES = [
    Probe("rewrite", prompt, ("Rome",))
    for prompt in ("Amber Falls lies in", "Who", "The company Bolt was founded by the sister of")
]


def test_the_entropy_of_a_sample_worked_out_by_hand():
    """Of ``a b a b a``: bigrams ab twice and ba twice, trigrams aba twice and bab once."""
    trigrams = 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)
    expected = (2 / 3 * 1.0 + 4 / 3 * trigrams) / 2
    after, base = {"sample": "a b a b a"}, {"sample": "a a a a"}
    fact = probe("rewrite", after=after, base=base)
    other = probe("rewrite", after={"sample": "x x x"}, base={"sample": "x y z"})
    silent = probe("rewrite", after={"text": "a b c"}, base={})
    records = [example(name, [p]) for name, p in (("1", fact), ("2", other), ("3", silent))]
    found = EditMetrics.from_records(records).compute()
    assert found["rewrite/ngram_entropy"] == pytest.approx(expected / 2)
    of_base = 2 / 3 / 2  # two different bigrams, one trigram
    assert found["rewrite/ngram_entropy_change"] == pytest.approx((expected - of_base) / 2)


def test_perplexity_is_of_passages_alone():
    probes = [
        probe("locality", "text", after={"log_prob": -math.log(8.0)}),
        probe("locality", "text", after={"log_prob": -math.log(2.0)}),
        probe("locality", "nq", after={"log_prob": -1.0}),
    ]
    found = EditMetrics.from_records([example("1", probes)]).compute()
    assert found["locality/perplexity"] == pytest.approx(5.0)
    assert "locality/nq/perplexity" not in found


def test_passages_of_a_text_are_locality_probes(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("one two three four\n\nfive six seven eight nine\n")
    asked = [(p.kind, p.prompt, p.answers, p.group) for p in locality_set(path)]
    assert asked == [
        ("locality", "one two", ("three four",), "text"),
        ("locality", "five six", ("seven eight nine",), "text"),
    ]


def test_draws_follow_the_shares_of_the_likeliest_tokens():
    scores = torch.tensor([[0.0, 1.0, 2.0, -9.0]]).expand(4000, 4)
    ids = torch.arange(4000)[:, None] + 7
    drawn = SeededChoice(pad_id=0, k=3)(ids, scores).argmax(-1).tolist()
    counts = Counter(drawn)
    shares = scores[0, :3].softmax(-1).tolist()
    assert counts.keys() == {0, 1, 2}
    for token, share in enumerate(shares):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.025)
    padded = torch.cat([torch.zeros(4000, 2, dtype=torch.long), ids], dim=1)
    assert SeededChoice(0, 3)(padded, scores).argmax(-1).tolist() == drawn
    assert SeededChoice(0, 3, seed=1)(ids, scores).argmax(-1).tolist() != drawn
    assert SeededChoice(0, 1)(ids, scores).argmax(-1).unique().tolist() == [2]


def test_samples_depend_on_their_own_row_alone():
    base = tiny_base("llama")
    edit = Toy(base_model=base).edit([EditRequest("Amber Falls lies in", "Italy", id="1")])
    with edit:
        reader = Reader(base, SAMPLED)
        whole = reader.readings(PROBES, reader.base_readings(PROBES))
        one = Reader(base, replace(SAMPLED, score_batch_size=1))
        apart = one.readings(PROBES[::-1], one.base_readings(PROBES[::-1]))[::-1]
    samples = [reading["sample"] for reading in whole]
    assert samples == [reading["sample"] for reading in apart]
    assert all(samples)
    greedy = base.generate([p.prompt for p in PROBES], 8)
    assert samples != greedy
    plain = Reader(base, replace(SAMPLED, sample_tokens=0)).base_readings(PROBES)
    assert all("sample" not in reading for reading in plain)
    carried = reader.readings(PROBES, reader.base_readings(PROBES), [edit, edit, None])
    assert [reading["sample"] for reading in carried[:2]] == samples[:2]


def test_the_protocol_names_samples_only_where_there_are_some():
    assert "sample_tokens" not in Protocol().facts()
    assert Protocol(sample_tokens=100).id != Protocol().id
    assert Protocol(sample_tokens=9, generate=False).id == Protocol(generate=False).id
    with pytest.raises(UnsupportedUseError, match="sample_tokens"):
        Protocol(sample_tokens=-1)

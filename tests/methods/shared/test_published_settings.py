"""The file of published settings: every entry fits its method, and means what the papers say."""

from __future__ import annotations

import pytest

from kedit_lightning import methods
from kedit_lightning.methods.finetune.shared.adapter_method import AdapterDefaults
from kedit_lightning.methods.finetune.shared.fine_tuning_method import FinetuneDefaults
from kedit_lightning.methods.locate.block_output import BlockSettings
from kedit_lightning.methods.locate.shared.closed_form_settings import LocateSettings
from kedit_lightning.methods.locate.ultraedit import UltraEditDefaults
from kedit_lightning.methods.memory.defer import DEFERDefaults
from kedit_lightning.methods.memory.grace import CodebookPlace
from kedit_lightning.methods.memory.melo import MELODefaults
from kedit_lightning.methods.memory.memoir import MEMOIRDefaults
from kedit_lightning.methods.memory.wise import WISEDefaults
from kedit_lightning.methods.safety.dinm.dinm import DINMDefaults
from kedit_lightning.methods.shared.published_settings import published_tables

KINDS = {
    **dict.fromkeys(("ROME", "MEMIT", "AlphaEdit", "AnyEdit", "PMET", "EMMET"), LocateSettings),
    "UltraEdit": UltraEditDefaults,
    "UnKE": BlockSettings,
    "CrispEdit": FinetuneDefaults,
    "FTL": FinetuneDefaults,
    "FTM": FinetuneDefaults,
    "DEFER": DEFERDefaults,
    "DINM": DINMDefaults,
    "GRACE": CodebookPlace,
    **dict.fromkeys(("LoRA", "AdaLoRA", "DPOEdit"), AdapterDefaults),
    "MELO": MELODefaults,
    "MEMOIR": MEMOIRDefaults,
    "WISE": WISEDefaults,
}
ENTRIES = [
    pytest.param(method, key, values, id=f"{method}-{'-'.join(map(str, key))}")
    for method, table in published_tables().items()
    for key, values in table.items()
]


def numbers(value):
    """All numbers of an entry."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    return [n for part in value for n in numbers(part)] if isinstance(value, list) else [value]


def test_every_table_belongs_to_a_method():
    assert set(published_tables()) == set(KINDS)
    for method in KINDS:
        assert hasattr(methods, method)
    assert methods.RROME.published == "ROME"
    for method in ("ROME", "MEMIT", "AlphaEdit", "AnyEdit", "PMET", "EMMET"):
        assert getattr(methods, method).published == method


@pytest.mark.parametrize(("method", "key", "values"), ENTRIES)
def test_an_entry_has_the_fields_of_its_kind_and_blocks_that_exist(method, key, values):
    family, blocks, width = key
    assert isinstance(family, str)
    assert isinstance(blocks, int)
    assert isinstance(width, int)
    KINDS[method](**values)  # an unknown field is refused
    # YAML reads 2e-3 as text.
    for name, value in values.items():
        if name == "target_modules":
            assert all(type(end) is str for end in value)
            continue
        if name == "suffix":
            assert type(value) is str
            continue
        assert all(type(number) in (int, float, bool) for number in numbers(value))
    layers = [*values.get("layers", ()), *({values["layer"]} if "layer" in values else ())]
    layers += [i for at in values.get("blocks", {}).values() for i in at]
    assert layers or method in ("UltraEdit", "DINM") or "target_modules" in values
    assert all(0 <= layer < blocks for layer in layers)
    assert {values.get("projection", 0), *values.get("blocks", ())} <= {0, 1, -1}


@pytest.mark.parametrize(
    ("method", "key", "settings"),
    [
        ("ROME", ("gpt2", 48, 1600), LocateSettings([17], steps=20, clamp=4.0, weight_decay=0.5)),
        ("ROME", ("qwen2", 28, 3584), LocateSettings([5], clamp=4.0, weight_decay=1e-3)),
        ("MEMIT", ("gpt2", 48, 1600), LocateSettings([13, 14, 15, 16, 17], 20_000, steps=20)),
        ("MEMIT", ("llama", 6, 256), LocateSettings([0, 1], 50)),
        (
            "MEMIT",
            ("mistral", 32, 4096),
            LocateSettings([4, 5, 6, 7, 8], 15_000, clamp=4.0, weight_decay=1e-3),
        ),
        ("AlphaEdit", ("gptj", 28, 4096), LocateSettings([3, 4, 5, 6, 7, 8], 15_000)),
        ("AlphaEdit", ("llama", 32, 4096), LocateSettings([4, 5, 6, 7, 8], lr=0.1)),
        (
            "PMET",
            ("gptj", 28, 4096),
            LocateSettings([3, 4, 5, 6, 7, 8], 6_000, steps=30, lr=0.2, kl_factor=1.0),
        ),
        ("EMMET", ("gptj", 28, 4096), LocateSettings([5], 100_000)),
        ("UltraEdit", ("llama", 6, 256), UltraEditDefaults(lr=2e-3)),
        ("UltraEdit", ("mistral", 32, 4096), UltraEditDefaults({-1: [29, 30]}, 1e-6)),
        ("FTM", ("mistral", 32, 4096), FinetuneDefaults([21], 25, 5e-5)),
        ("FTL", ("gptj", 28, 4096), FinetuneDefaults([0], 25, 5e-5)),
        ("FTM", ("chatglm", 28, 4096), FinetuneDefaults([27], 40, float("inf"))),
        ("GRACE", ("gpt2", 48, 1600), CodebookPlace(35, 0)),
        ("MELO", ("gpt2", 48, 1600), MELODefaults(35, [36, 37], 0, 0.5, 1e-3, 350)),
    ],
)
def test_entries_written_out(method, key, settings):
    assert KINDS[method](**published_tables()[method][key]) == settings

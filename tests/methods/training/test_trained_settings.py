"""Settings of trained methods: what was left to the base model or a checkpoint is recorded."""

from __future__ import annotations

import pytest
from support import REQUESTS, tiny_base

from kedit_lightning import methods


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *((name, "modules", None) for name in ("MEND", "KE", "MALMEN", "RLEdit")),
        ("MEND", "rank", 1920),
        ("RLEdit", "rank", 1024),
        ("MALMEN", "tokens", "answer"),
        ("KE", "hidden", 128),
        ("SERAC", "layer", 1),
    ],
)
def test_an_edit_of_a_trained_method_records_the_settings_used(name, setting, value):
    method = getattr(methods, name)(tiny_base("llama"), checkpoint="none")
    assert method.hparams[setting] is None
    recorded = method.edit(REQUESTS[:1]).origin.settings[setting]
    assert recorded == (list(method.network.plan.modules) if setting == "modules" else value)

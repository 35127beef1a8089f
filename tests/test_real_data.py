"""All methods on real records, with the packaged model and one that knows no facts."""

from __future__ import annotations

import pytest
from scores import header, markdown, real_data, run

from kedit_lightning.methods import METHODS

RECORDS = 10


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(900)
def test_all_methods_on_real_records(shared_data, record_property):
    models = ["nano", str(shared_data / "models" / "stories260K")]
    lines = list(run(models, real_data(shared_data, RECORDS), METHODS))
    record_property("table", "\n".join([header(), *map(markdown, lines)]))
    assert len(lines) == len(models) * 2 * len(METHODS)
    for line in lines:
        assert {"rewrite", "rephrase", "kept"} <= line.scores.keys()
        for mean, low, high in line.scores.values():
            assert 0 <= low <= mean <= high <= 1
    written = {(line.model, line.data, line.method): line.scores["rewrite"][0] for line in lines}
    # Fine-tuning writes anything into any model, so a failure here is a failure of the plumbing.
    assert min(score for key, score in written.items() if key[2] == "FTM") >= 0.8

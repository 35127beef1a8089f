"""Methods that need no fit on real records, with the packaged model and one that knows no facts."""

from __future__ import annotations

import pytest
from measured_methods import MEASURED
from scores import header, markdown, real_data, run

RECORDS = 5
#: Methods that have not been run on all of these records and models yet.
UNTRIED = (
    *("AdaLoRA", "CaliNet", "DINM", "DPOEdit", "LoRA", "MELO", "MEMOIR", "TPatcher", "WISE"),
    *("AnyEdit", "LyapLock", "NSE"),
)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3000)
def test_all_methods_on_real_records(shared_data, record_property):
    models = ["nano", str(shared_data / "models" / "stories260K")]
    names = [name for name in MEASURED if name not in UNTRIED]
    lines = list(run(models, real_data(shared_data, RECORDS), names))
    record_property("table", "\n".join([header(), *map(markdown, lines)]))
    assert len(lines) == len(models) * 2 * len(names)
    for line in lines:
        assert {"rewrite", "rephrase", "kept"} <= line.scores.keys()
        for mean, low, high in line.scores.values():
            assert -1e-9 <= low <= mean + 1e-9 <= high + 2e-9 <= 1 + 3e-9
    written = {(line.model, line.data, line.method): line.scores["rewrite"][0] for line in lines}
    # What a small model can be made to say about records it knows nothing of is a matter of the
    # method; that fine-tuning writes most CounterFact records shows that the plumbing works.
    assert written["nano", "CounterFact", "FTM"] >= 0.5

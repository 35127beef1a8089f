"""What an edit did, in numbers with intervals.

:class:`EditMetrics` scores records of examples; the classes of :mod:`.scores` are its parts, and
:mod:`.functional` holds the arithmetic.
"""

from kedit_lightning.metrics.edit_metrics import COST_BLOCKS, EditMetrics
from kedit_lightning.metrics.example_record import ExampleRecord, ProbeReading, ProbeRecord
from kedit_lightning.metrics.keyed import KeyedMetrics, SummaryRow
from kedit_lightning.metrics.scores.case_mean import (
    ANSWER_SCORES,
    LOCALITY_SCORES,
    BaseKL,
    CaseMean,
    Cases,
    CostMean,
    ExactMatch,
    GenerationContains,
    GenerationExact,
    Inflation,
    ProbabilityPreference,
    ProbeMean,
    StillKnown,
    TokenMatch,
    UnchangedText,
    UnchangedTop1,
    name_id,
)
from kedit_lightning.metrics.scores.legacy import LegacyEasyEdit

__all__ = [
    "ANSWER_SCORES",
    "COST_BLOCKS",
    "LOCALITY_SCORES",
    "BaseKL",
    "CaseMean",
    "Cases",
    "CostMean",
    "EditMetrics",
    "ExactMatch",
    "ExampleRecord",
    "GenerationContains",
    "GenerationExact",
    "Inflation",
    "KeyedMetrics",
    "LegacyEasyEdit",
    "ProbabilityPreference",
    "ProbeMean",
    "ProbeReading",
    "ProbeRecord",
    "StillKnown",
    "SummaryRow",
    "TokenMatch",
    "UnchangedText",
    "UnchangedTop1",
    "name_id",
]

"""Metrics of edits, with confidence intervals.

:class:`EditMetrics` computes the registered metrics from records of examples. The classes of
:mod:`.scores` are these metrics, each with the :class:`Measurement` objects that it reads;
:mod:`.functional` holds the arithmetic.
"""

from kedit_lightning.metrics.edit_metrics import COST_BLOCKS, EditMetrics, SquadMetrics
from kedit_lightning.metrics.example_record import ExampleRecord, ProbeReading, ProbeRecord
from kedit_lightning.metrics.keyed_metrics import KeyedMetrics, SummaryRow
from kedit_lightning.metrics.measurement import ForwardPass, Measurement
from kedit_lightning.metrics.scores.answers import (
    ANSWER_SCORES,
    ExactMatch,
    GenerationContains,
    GenerationExact,
    Inflation,
    NegativeLogLikelihood,
    ProbabilityPreference,
    TokenMatch,
)
from kedit_lightning.metrics.scores.case_mean import CaseMean, Cases, ProbeMean, name_id
from kedit_lightning.metrics.scores.choices import (
    BestChoice,
    RightAbove,
    RightMass,
)
from kedit_lightning.metrics.scores.concepts import (
    ConsistencyCosine,
    ConsistencyJudged,
    InstanceChange,
    InstanceShift,
    InstanceToNo,
    InstanceToYes,
    InstanceUnparsed,
)
from kedit_lightning.metrics.scores.defence import (
    DefenceChange,
    DefenceGeneralization,
    DefenceSuccess,
)
from kedit_lightning.metrics.scores.edit_cost import CostMean
from kedit_lightning.metrics.scores.fluency import (
    FLUENCY_SCORES,
    Fluency,
    FluencyChange,
    TextPerplexity,
)
from kedit_lightning.metrics.scores.generation_quality import (
    GENERATION_SCORES,
    AllWordings,
    AnswerOverlap,
    AnyWording,
    Repetition,
    RunOn,
)
from kedit_lightning.metrics.scores.legacy import LegacyEasyEdit
from kedit_lightning.metrics.scores.locality import (
    LOCALITY_SCORES,
    BaseKL,
    StillKnown,
    UnchangedText,
    UnchangedTop1,
)
from kedit_lightning.metrics.scores.passages import (
    PASSAGE_SCORES,
    CharacterRouge,
    PassageBleu,
    PassageCosine,
    PassageRouge,
    PassageRouge1Recall,
    PassageRouge2Recall,
    PassageRougeLRecall,
)
from kedit_lightning.metrics.scores.tasks import (
    TASK_SCORES,
    Forgotten,
    Judged,
    OpinionSuccess,
    OtherForms,
    Retained,
    RippleTest,
    SentimentShift,
    SeveralHops,
    Undoubted,
)
from kedit_lightning.metrics.scores.traits import (
    AdjectiveShift,
    TraitAccuracy,
    TraitCoherent,
    TraitShift,
)

#: Metrics of a protocol's scoring.
SCORINGS: dict[str, type[KeyedMetrics]] = {
    "default": EditMetrics,
    "legacy_easyedit": LegacyEasyEdit,
}

__all__ = [
    "ANSWER_SCORES",
    "COST_BLOCKS",
    "FLUENCY_SCORES",
    "GENERATION_SCORES",
    "LOCALITY_SCORES",
    "PASSAGE_SCORES",
    "SCORINGS",
    "TASK_SCORES",
    "AdjectiveShift",
    "AllWordings",
    "AnswerOverlap",
    "AnyWording",
    "BaseKL",
    "BestChoice",
    "CaseMean",
    "Cases",
    "CharacterRouge",
    "ConsistencyCosine",
    "ConsistencyJudged",
    "CostMean",
    "DefenceChange",
    "DefenceGeneralization",
    "DefenceSuccess",
    "EditMetrics",
    "ExactMatch",
    "ExampleRecord",
    "Fluency",
    "FluencyChange",
    "Forgotten",
    "ForwardPass",
    "GenerationContains",
    "GenerationExact",
    "Inflation",
    "InstanceChange",
    "InstanceShift",
    "InstanceToNo",
    "InstanceToYes",
    "InstanceUnparsed",
    "Judged",
    "KeyedMetrics",
    "LegacyEasyEdit",
    "Measurement",
    "NegativeLogLikelihood",
    "OpinionSuccess",
    "OtherForms",
    "PassageBleu",
    "PassageCosine",
    "PassageRouge",
    "PassageRouge1Recall",
    "PassageRouge2Recall",
    "PassageRougeLRecall",
    "ProbabilityPreference",
    "ProbeMean",
    "ProbeReading",
    "ProbeRecord",
    "Repetition",
    "Retained",
    "RightAbove",
    "RightMass",
    "RippleTest",
    "RunOn",
    "SentimentShift",
    "SeveralHops",
    "SquadMetrics",
    "StillKnown",
    "SummaryRow",
    "TextPerplexity",
    "TokenMatch",
    "TraitAccuracy",
    "TraitCoherent",
    "TraitShift",
    "UnchangedText",
    "UnchangedTop1",
    "Undoubted",
    "name_id",
]

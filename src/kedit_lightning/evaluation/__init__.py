"""What is asked of a base model before and after an edit, and how edits are applied meanwhile."""

from kedit_lightning.evaluation.output_folder import OutputFolder
from kedit_lightning.evaluation.protocol import Protocol
from kedit_lightning.evaluation.reading import Reader
from kedit_lightning.evaluation.runner import ProtocolRunner, Scored
from kedit_lightning.evaluation.steps import EvaluationSteps

__all__ = [
    "EvaluationSteps",
    "OutputFolder",
    "Protocol",
    "ProtocolRunner",
    "Reader",
    "Scored",
]

"""How a benchmark is run: protocol, runner, reader, and what a run hands to its method."""

from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.benchmark.run_context import EvaluationSteps
from kedit_lightning.benchmark.runner import ProtocolRunner, Scored

__all__ = [
    "EvaluationSteps",
    "Protocol",
    "ProtocolRunner",
    "Reader",
    "Scored",
]

"""How a benchmark is run: protocol, runner, reader, the context of a run, and its callbacks."""

from kedit_lightning.benchmark.edit_callback import EditCallback
from kedit_lightning.benchmark.judge import Judge
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.benchmark.run_context import RunContext
from kedit_lightning.benchmark.runner import ProtocolRunner

__all__ = ["EditCallback", "Judge", "Protocol", "ProtocolRunner", "Reader", "RunContext"]

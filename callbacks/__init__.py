"""Callbacks of editing runs, imported as :mod:`kedit_lightning.callbacks`."""

if __name__ == "callbacks":  # a second copy of every class, unknown to the command line
    raise ImportError("import kedit_lightning.callbacks, not callbacks")

from kedit_lightning.benchmark import EditCallback

from .ability_check import AbilityCheck
from .ability_sample import AbilitySample
from .canary_guard import CanaryGuard
from .causal_tracing import CausalTracing
from .edit_saver import EditSaver
from .edit_table import EditTable
from .layer_sweep import LayerSweep
from .place_base_model import PlaceBaseModel
from .results_writer import ResultsWriter
from .rollback_guard import RollbackGuard
from .stream_drift import StreamDrift
from .training_report import TrainingReport
from .wandb_table import WandbTable

__all__ = [
    "AbilityCheck",
    "AbilitySample",
    "CanaryGuard",
    "CausalTracing",
    "EditSaver",
    "EditTable",
    "LayerSweep",
    "PlaceBaseModel",
    "ResultsWriter",
    "RollbackGuard",
    "StreamDrift",
    "TrainingReport",
    "WandbTable",
]


def usual_callbacks() -> list[EditCallback]:
    """The callbacks of every run, in the order of their calls.

    An edit is saved before the results that come from it.
    """
    saved = [PlaceBaseModel(), EditSaver(), ResultsWriter()]
    return [*saved, RollbackGuard(), EditTable(only_edit=True), WandbTable(), TrainingReport()]

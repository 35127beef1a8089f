"""What a run leaves on disk: output folder, results, exported models, and the prompts it reads."""

from kedit_lightning.runs.ledger import Ledger
from kedit_lightning.runs.model_export import check_export, export_edits
from kedit_lightning.runs.output_folder import OutputFolder

__all__ = ["Ledger", "OutputFolder", "check_export", "export_edits"]

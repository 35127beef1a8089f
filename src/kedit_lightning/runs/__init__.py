"""What a run leaves on disk: output folder, results, exported models, and the prompts it reads."""

from kedit_lightning.runs.output_folder import OutputFolder

__all__ = ["OutputFolder"]

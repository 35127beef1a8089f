"""What a run leaves on disk: output folder, results, exported models, and the prompts it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kedit_lightning.registry import lazy_exports
from kedit_lightning.runs.output_folder import OutputFolder

if TYPE_CHECKING:
    from kedit_lightning.runs.model_export import check_export, export_edits

#: Lazily, because it leads to peft.
_get = lazy_exports(
    None, dict.fromkeys(("check_export", "export_edits"), "kedit_lightning.runs.model_export")
)

__all__ = ["OutputFolder", "check_export", "export_edits"]


def __getattr__(name: str) -> Any:
    return _get(name)

"""Knowledge editing of language models with PyTorch Lightning.

Importing this package loads neither torch nor transformers: each public name is imported from its
module on first use, so that ``kedit --help`` and plain imports are fast.
"""

from typing import TYPE_CHECKING

from kedit_lightning.notices import import_progress_bars, quieten_imports
from kedit_lightning.registry import lazy_exports

if TYPE_CHECKING:
    from .base_models import BaseModel, BaseModelSpec
    from .edits import Edit
    from .requests import EditBatch, EditExample, EditRequest, Probe
    from .trainer import EditTrainer

__version__ = "0.1.0"

__all__ = [
    "BaseModel",
    "BaseModelSpec",
    "Edit",
    "EditBatch",
    "EditExample",
    "EditRequest",
    "EditTrainer",
    "Probe",
    "__version__",
]

_NAMES_IN = {
    "base_models": ("BaseModel", "BaseModelSpec"),
    "edits": ("Edit",),
    "requests": ("EditBatch", "EditExample", "EditRequest", "Probe"),
    "trainer": ("EditTrainer",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}
__getattr__ = lazy_exports(None, {n: f"{__name__}.{module}" for n, module in _MODULE_OF.items()})

import_progress_bars()
quieten_imports()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

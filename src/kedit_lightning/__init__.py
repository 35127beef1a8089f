"""Knowledge editing of language models with PyTorch Lightning.

Importing this package loads neither torch nor transformers: each public name is fetched from its
module when it is first used, so that ``kedit --help`` and plain imports answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_MODULE_OF = {
    "BaseModel": "base_models",
    "BaseModelSpec": "base_models",
    "Edit": "edits",
    "EditBatch": "requests",
    "EditExample": "requests",
    "EditRequest": "requests",
    "EditTrainer": "trainer",
    "Probe": "requests",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name and hand the name out."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

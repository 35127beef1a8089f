"""What other libraries say that users of this package can do nothing about, kept quiet."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

#: Starts of warnings of Lightning, as regular expressions.
_WARNINGS = (
    ".*LeafSpec.* is deprecated",  # lightning 2.6 on torch 2.13
    "The '.*_dataloader' does not have many workers",  # text is cheap to load
    ".LightningModule.configure_optimizers. returned .None.",  # statistics need no optimizer
    "Found .* in eval mode at the start of training",  # the base model stays in eval mode
    "The dirpath has changed",  # of a checkpoint that is read from another folder
)
#: Loggers of Lightning that list devices, advertise other packages, and tell which file is read.
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
)
#: Loggers of libraries that quantise, and starts of what they say when transformers or peft import
#: them: which kernels, for other processors, they lack.
_IMPORTS = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "<enum",
    "bitsandbytes.backends.cpu.ops": "Failed to load",
}
#: Starts of what a ``ModelCheckpoint`` says if it was told to.
_ASKED_FOR = ("Epoch ",)


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.getMessage().startswith(_ASKED_FOR)


@contextmanager
def without_notices() -> Iterator[None]:
    """Keep notices of Lightning quiet inside, and leave filters and levels as they were.

    Warnings of other kinds, errors, and what a callback was told to say are shown; if Lightning is
    set to log for debugging, so is everything that it logs.
    """
    debugs = logging.getLogger("lightning.pytorch").isEnabledFor(logging.DEBUG)
    loggers = [] if debugs else [logging.getLogger(name) for name in _LOGGERS]
    loggers = [logger for logger in loggers if _matters not in logger.filters]  # not yet quiet
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.addFilter(_matters)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_matters)


class _Unsaid(logging.Filter):
    """Leaves out messages that begin with a text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.name)


def quieten_imports() -> None:
    """Leave out what libraries that quantise say when transformers or peft import them."""
    for name, start in _IMPORTS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Unsaid) for known in logger.filters):
            logger.addFilter(_Unsaid(start))


def import_progress_bars() -> None:
    """In a notebook, import tqdm before others do, without its advice to install ipywidgets.

    Without them it shows its bars as text.
    """
    if "ipykernel" in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            import_module("tqdm.auto")


def bars_are_hidden() -> bool:
    """Whether rich has no place for a bar: a notebook without ipywidgets, where it gives advice."""
    return "ipykernel" in sys.modules and find_spec("ipywidgets") is None

"""Where the data of a command comes from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from kedit_lightning.errors import UnsupportedUseError


def data_source(
    command: str, dataloaders: Any, datamodule: LightningDataModule | None
) -> tuple[Any, LightningDataModule | None]:
    """Loaders and data module, wherever the data module was given; they must serve the command."""
    if isinstance(dataloaders, LightningDataModule):
        dataloaders, datamodule = None, dataloaders
    if dataloaders is None and datamodule is None:
        raise UnsupportedUseError(
            f"{command} was given no data; name a dataset, such as --data Requests "
            "--data.path facts.json, or `-c data/counterfact`"
        )
    names = {"fit": "train", "validate": "val", "predict": "predict"}
    loader = f"{names.get(command, 'test')}_dataloader"
    kind = type(datamodule)
    if datamodule is not None and getattr(kind, loader) is getattr(LightningDataModule, loader):
        raise UnsupportedUseError(
            f"{kind.__name__} holds nothing for {command}; name another dataset with --data"
        )
    return dataloaders, datamodule

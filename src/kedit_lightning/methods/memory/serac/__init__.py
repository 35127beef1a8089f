"""SERAC."""

from kedit_lightning.methods.memory.serac.serac import SERAC

__all__ = ["SERAC"]

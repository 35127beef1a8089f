"""MALMEN."""

from kedit_lightning.methods.hypernetwork.malmen.malmen import MALMEN

__all__ = ["MALMEN"]

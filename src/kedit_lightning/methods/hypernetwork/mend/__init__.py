"""MEND."""

from kedit_lightning.methods.hypernetwork.mend.mend import MEND

__all__ = ["MEND"]

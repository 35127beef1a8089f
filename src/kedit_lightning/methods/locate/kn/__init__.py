"""KN."""

from kedit_lightning.methods.locate.kn.kn import KN

__all__ = ["KN"]

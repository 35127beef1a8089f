"""KE."""

from kedit_lightning.methods.hypernetwork.ke.ke import KE

__all__ = ["KE"]

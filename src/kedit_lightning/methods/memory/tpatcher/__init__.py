"""T-Patcher: one neuron a mistake in the last MLP."""

from kedit_lightning.methods.memory.tpatcher.tpatcher import TPatcher

__all__ = ["TPatcher"]

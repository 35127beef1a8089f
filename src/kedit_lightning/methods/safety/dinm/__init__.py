"""DINM: method, location of the toxic layer, and passes with a constraint."""

from kedit_lightning.methods.safety.dinm.dinm import DINM

__all__ = ["DINM"]

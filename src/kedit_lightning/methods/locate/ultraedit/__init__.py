"""UltraEdit."""

from kedit_lightning.methods.locate.ultraedit.ultraedit import UltraEdit

__all__ = ["UltraEdit"]

"""Plain text for covariances of keys."""

from kedit_lightning.registry import lazy_exports

# The library ``datasets`` takes a second to import, which local files do without.
__getattr__ = lazy_exports(None, {"hub_texts": "kedit_lightning.data.text.hub_stream"})

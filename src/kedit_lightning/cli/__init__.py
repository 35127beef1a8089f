"""The ``kedit`` command."""

"""``python -m kedit_lightning`` is the ``kedit`` command."""

from kedit_lightning.cli.main import main

main()

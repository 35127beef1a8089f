"""Packaged configs, importable as ``kedit_lightning.configs``.

One YAML a method, a dataset, a trainer; they compose on the command line.
"""

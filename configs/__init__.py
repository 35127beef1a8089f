"""Packaged configs, importable as ``kedit_lightning.configs``: one YAML a method, a dataset, a trainer."""

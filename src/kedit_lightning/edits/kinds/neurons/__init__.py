"""Neurons added beside an MLP (T-Patcher, CaliNet)."""

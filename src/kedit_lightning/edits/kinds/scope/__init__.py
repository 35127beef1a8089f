"""Facts answered by a counterfactual model inside their scope (SERAC)."""

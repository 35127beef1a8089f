"""Analysis of models and runs: causal tracing, layer sweeps, learning curves, figures."""

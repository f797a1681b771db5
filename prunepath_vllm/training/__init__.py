"""Training: losses, recipes, the trainer, baselines. Needs neither vLLM nor Triton."""

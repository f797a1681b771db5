"""How good a checkpoint is, at which sparsity."""

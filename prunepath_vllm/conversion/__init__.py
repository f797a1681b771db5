"""Dense checkpoints become PrunePath checkpoints: neuron grouping, conversion, router calibration, model card."""

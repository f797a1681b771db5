"""What PrunePath is compared with. LTE is a recipe (its losses are in training.losses); the pruned models are here."""

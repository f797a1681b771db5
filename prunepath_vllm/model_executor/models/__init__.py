"""vLLM model classes: one file for the GLU families, whose classes are made from families.py, one for each other."""

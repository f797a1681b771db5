"""vLLM model classes, one file per family."""

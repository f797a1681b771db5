"""The vLLM side: layers, models and the path of tau from the request to the feed-forward layer."""

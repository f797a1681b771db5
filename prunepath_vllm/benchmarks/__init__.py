"""Speed, dense beside sparse: the layer alone, the engine's latency, the server. Right first, then fast."""

"""What an operator adds to the engine's server: bounds on tau, a prefill tau, information and metrics."""

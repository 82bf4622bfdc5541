"""Language models: load, generate, capture, steer."""

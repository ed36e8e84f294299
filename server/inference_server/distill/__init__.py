"""Trains what proposes tokens for a model, on text that the model writes itself."""

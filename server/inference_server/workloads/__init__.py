"""Streams of requests by name and seed: what arrives, when, how long. Imports neither torch nor the web stack."""

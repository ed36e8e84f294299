"""Inference Workbench in Python."""

"""Proposes tokens that the model then verifies in one step: who, for which request, and how many."""

"""Recordings: the journal that is written while things happen, and the file that it becomes. No torch, no web stack."""

"""The front: HTTP and WebSocket, tokenization, the event log, and the supervision of engine processes.

Imports no torch and no transformers, so that it is up in about a second and answers whatever the engine is doing.
"""

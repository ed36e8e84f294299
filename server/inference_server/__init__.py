"""The inference server of Inference Workbench: an HTTP and WebSocket front, and the engine it supervises.

Importing this package imports no torch; :mod:`inference_server.engine` does.
"""

"""Run an engine process: ``python -m inference_server.engine --config … --receive … --send …``."""

from inference_server.engine.process import main

main()

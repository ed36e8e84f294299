#!/bin/sh
# Runs the engine's tests with their models on the GPU: kernels, engine, every architecture under every combination.
export INFERENCE_WORKBENCH_TEST_DEVICE=cuda
cd "$(dirname "$0")/../../.." || exit
# The deselected test counts the steps of an engine that does not look ahead.
exec python3 -m pytest -q tests/server/engine --ignore tests/server/engine/test_fast_llama.py \
  --ignore tests/server/engine/test_default_model.py --ignore tests/server/engine/test_structured.py \
  --deselect tests/server/engine/test_engine.py::test_switching_the_kv_cache_reports_what_it_cost_and_when_it_was_over \
  "$@"

#!/bin/sh
# Runs the engine's tests with their models on the GPU: kernels, engine, every architecture under every combination.
# ENGINE_PROPERTY_SECONDS=300 on_gpu.sh -s -k every_request_gets_the_output_it_gets_alone lets the property machine of the
# whole engine go on for so long, in one process, and prints how many examples it tried.
export INFERENCE_WORKBENCH_TEST_DEVICE=cuda
cd "$(dirname "$0")/../../.." || exit
PYTHONPATH="$PWD/server${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec python3 -m pytest -q tests/server/engine --ignore tests/server/engine/test_fast_llama.py \
  --ignore tests/server/engine/test_default_model.py --ignore tests/server/engine/test_structured.py "$@"

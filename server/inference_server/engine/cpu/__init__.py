"""The fast path on a CPU: own kernels beside torch's, chosen by measurement. Only this part of the engine needs numba."""

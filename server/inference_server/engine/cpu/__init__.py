"""The fast path on a CPU: own kernels beside torch's, chosen by measurement. Nothing else here needs numba."""

"""The fast path on a CPU: own kernels beside torch's, chosen by measurement. Needs numba; everything else works without."""

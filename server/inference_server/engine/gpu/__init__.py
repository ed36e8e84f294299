"""The fast path on a GPU: Triton kernels for the Llama family, replayed as CUDA graphs."""

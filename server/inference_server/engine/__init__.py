"""The engine: scheduling, KV cache, forward pass and sampling. Needs torch, transformers, numpy and msgspec alone.

Read it in this order: :mod:`~inference_server.engine.request`, :mod:`~inference_server.engine.block_pool`,
:mod:`~inference_server.engine.kv_cache`, :mod:`~inference_server.engine.scheduler` (pure Python), then
:mod:`~inference_server.engine.attention`, :mod:`~inference_server.engine.runner` and
:mod:`~inference_server.engine.sampler` (torch), then :mod:`~inference_server.engine.core`, which puts them together,
and :mod:`~inference_server.engine.process`, which gives it a process of its own.
"""

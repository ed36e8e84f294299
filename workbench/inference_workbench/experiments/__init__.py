"""Experiments: the same requests under different settings, measured, with intervals, kept in a file.

``workloads`` says what is sent, ``target`` to whom, ``sender`` sends it and stamps what comes back, ``figures`` turns
that into metrics, ``conductor`` goes through the runs of an experiment and ``journal`` keeps each on disk; ``compare``,
``ablation``, ``crossover`` and ``capacity`` ask the questions, ``statistics`` and ``outputs`` answer them.
"""

"""Solvers: the file NAME.py holds the sampler NAME of `SAMPLERS`, so that adding one is adding a file."""

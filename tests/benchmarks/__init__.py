"""Ours beside diffusers': `python -m tests.benchmarks.compare` measures, `python -m tests.benchmarks.flops` counts."""

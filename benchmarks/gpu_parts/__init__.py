"""The parts of benchmarks/gpu.py: what is measured, in processes of their own, and what is made of it."""

"""Benchmarks, one file each; configuration names them, nothing else does."""

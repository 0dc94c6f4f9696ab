"""Evaluation harness and calibrated hallucination warnings for large vision-language models."""

__version__ = "0.1.0"

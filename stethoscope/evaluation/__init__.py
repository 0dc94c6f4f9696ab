"""Evaluate one model on one task: the loop, its pipeline, its state, its results."""

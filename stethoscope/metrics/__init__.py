"""Compute classification metrics and their confidence intervals from a cluster bootstrap."""

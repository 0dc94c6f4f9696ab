"""Configuration files, found by Hydra as ``pkg://stethoscope.conf``."""

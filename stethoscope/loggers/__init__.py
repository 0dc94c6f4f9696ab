"""Loggers: where metrics, tables and media of a run go."""

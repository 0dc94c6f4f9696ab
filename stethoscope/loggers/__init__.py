"""Loggers: where metrics, tables and media of a run go.

``base`` is their contract, and ``combined`` sends everything to several; each other module is one kind of logger.
"""

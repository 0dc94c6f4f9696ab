"""Tables, plots and pages of finished run directories: pure functions of their files, without a model.

``run_source`` reads a run; ``metrics_tables`` and ``plots`` make of it what ``run_report`` and ``console`` show;
``compare`` and ``sweep`` set runs beside each other. Nothing here imports torch.
"""

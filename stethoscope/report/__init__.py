"""Tables, plots and pages of finished run directories: pure functions of their files, without a model.

``run_source`` reads a run, ``metrics_tables`` and ``plots`` make tables and plots of it, ``run_report`` a report.
``compare`` and ``sweep`` set runs beside each other, ``sample_list`` lists their samples, and ``mitigation_table``
compares methods against hallucinations. ``export`` writes a run for other tools. Nothing here imports torch.
"""

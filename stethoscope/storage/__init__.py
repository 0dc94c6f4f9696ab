"""Runs on disk, and logs of answers that were written elsewhere.

``run_dir`` reads and writes a run: ``records`` has its samples, ``tokens`` their token rows, ``saved_heatmaps``
pictures and maps, ``sample_notes`` what people noted. ``run_fingerprint`` says when two runs are the same, ``reuse``
copies from one to another, ``lock`` keeps writers apart, ``sweep_jobs`` has the jobs of a sweep.

``logged_answers`` reads logs of other tools through ``foreign_logs``, ``inspect_logs`` and ``server_logs``, whose
values ``log_values`` checks; ``answer_file`` is a log of our own.
"""

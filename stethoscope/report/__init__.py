"""What a finished run directory says, as tables, plots and a page: pure functions of its files, without a model.

``source`` reads a run; ``figures`` and ``curves`` make of it what ``tables``, ``svg`` and ``page`` show; ``versus``
sets runs against each other. Nothing here imports torch.
"""

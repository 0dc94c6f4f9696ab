"""The commands. Each module is imported only when its command runs, so that ``--help`` and ``list`` stay quick."""

HYDRA_COMMANDS = {
    "benchmark": "POPE, CHAIR and the hallucination detector in one run (the default job)",
    "evaluate": "run one model on one task: answers and metrics",
    "extract": "add token features to a finished run, without generating again",
    "train": "fit, calibrate and judge a detector on the features of a run",
}
PLAIN_COMMANDS = {
    "list": "what there is to choose from: models, tasks, features, detectors, ...",
    "doctor": "check this machine and say what is missing, or what a model needs (model=...)",
}

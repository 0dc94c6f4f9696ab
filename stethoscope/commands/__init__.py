"""The commands, each in a module of its own that is imported only when it runs.

So ``--help`` and ``list`` stay quick.
"""

HYDRA_COMMANDS = {
    "benchmark": "POPE, CHAIR and the hallucination detector in one run (the default job)",
    "evaluate": "run one model on one task: answers and metrics",
    "answer": "ask a server (vLLM, SGLang, llama.cpp, ...) the questions of a task; `evaluate` reads its answers",
    "mitigate": "methods against hallucinations, compared with greedy decoding and with trivial controls",
    "extract": "add token features to a finished run, without generating again",
    "diagnose": "one picture, one question: the answer with its warnings, and what every token was written from",
    "app": "a page on which one asks, looks at every word of the answer, and goes through finished runs",
    "train": "fit, calibrate and judge a detector on the features of a run",
    "export": "a finished run for Every Eval Ever, the hub or inspect's viewer, or as a data set",
}
"""Commands with a configuration of Hydra, ``conf/<command>.yaml``; each module has a ``run(config)``."""
PLAIN_COMMANDS = {
    "judge": "captions of any model: the probability that each object they name is invented, from the text alone",
    "report": "what a finished run has found: one page, Markdown and LaTeX tables",
    "compare": "runs against each other, paired on the same samples; one table for a whole sweep",
    "list": "what there is to choose from: models, tasks, features, detectors, ...",
    "doctor": "check this machine and say what is missing, or what a model needs (model=...)",
}
"""Commands that read their own arguments; each module has a ``main(arguments)``, and its help in ``USAGE``."""

"""What several tests of tasks share."""

import inspect

import numpy as np
import pandas as pd

from stethoscope.core.types import Answer
from stethoscope.metrics.bootstrap import count_metrics

QUESTIONS = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.png", "text": "Is there a fire hydrant in the image?", "label": "no"},
    {"question_id": 3, "image": "b.png", "text": "Is there an apple in the image?", "label": "Yes"},
]


def reply(text: str, finished: bool = True) -> Answer:
    """An answer of one token."""
    return Answer(text, (1,), ((0, len(text)),), (0.0,), finished)


def settings_of(task) -> dict:
    """The arguments that a task was made with, as far as it keeps them."""
    names = inspect.signature(type(task)).parameters
    return {name: value for name, value in vars(task).items() if name in names}


def totals_of(counts) -> dict:
    """Counts of several answers added up, as metrics take them."""
    counts = list(counts)
    names = {name for answer_counts in counts for name in answer_counts}
    return {name: np.array(sum(answer_counts.get(name, 0.0) for answer_counts in counts)) for name in names}


def figures(task, answers):
    """Metrics of answers by sample id: (metric, subset) -> value."""
    judged = [(s, task.score(s, reply(answers[s.id])).counts) for s in task.samples() if s.id in answers]
    rows = task.tally(judged)
    counts = pd.DataFrame([dict(row.counts) for row in rows]).fillna(0.0)
    metric_rows = count_metrics(task.metrics(), counts, [r.group for r in rows], [r.subset for r in rows], replicates=0)
    return {(row.metric, row.subset): row.interval.value for row in metric_rows}

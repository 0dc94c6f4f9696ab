"""Add a callback: a log of the longest answers, and their mean length as a curve.

    PYTHONPATH=examples stethoscope evaluate --config-dir examples/conf plugins=[custom_callback] \
        callbacks=lengths task=chair task.scenes=100
"""

from stethoscope.evaluation.callbacks import Callback


class AnswerLengths(Callback):
    """Log the mean length of all answers so far, in tokens, and the ids of the longest ones at the end."""

    first_only = True  # of several processes, the first one logs

    def __init__(self, longest: int = 5) -> None:
        self.longest = longest
        self.lengths: dict[str, int] = {}

    def on_task_start(self, run) -> None:
        """Reset the lengths when a task starts."""
        self.lengths = {}

    def on_batch_end(self, run, records) -> None:
        """Log the mean length once the records of a batch are on disk."""
        self.lengths |= {record.sample_id: len(record.answer.token_ids) for record in records if record.answer}
        if self.lengths:
            run.log({"progress/answer_tokens": sum(self.lengths.values()) / len(self.lengths)}, step=run.done)

    def on_task_end(self, run, results) -> None:
        """Log the longest answers once the results are computed, stored and logged."""
        longest = sorted(self.lengths.items(), key=lambda item: -item[1])[: self.longest]
        run.loggers.log_table(f"{run.task.name}/longest", ["sample", "tokens"], longest)

"""Add a feature: a function of a trace with a value for every answer token.

The first line of its docstring explains it in lists.

    stethoscope evaluate task=chair task.scenes=100 name=first
    PYTHONPATH=examples stethoscope extract --config-dir examples/conf plugins=[custom_feature] \
        run=runs/first features=surprise
    stethoscope train run=runs/first

The columns are then in `tokens.parquet`, on the leader board, and the detector has learned from them.
"""

import numpy as np
from torch import Tensor

from stethoscope.features import FeatureSet, feature
from stethoscope.features.attention import attn_image

__all__ = ["FeatureSet"]  # the YAML file names it, so that this module is imported and its features are registered


@feature("surprise", higher_means="hallucinated")
def running_nll(trace) -> np.ndarray:
    """Compute the mean negative log-probability of a token and the two before it, in nats.

    Higher means hallucinated.
    """
    nll = -np.array(trace.answer.logprobs)
    return np.array([nll[max(index - 2, 0) : index + 1].mean() for index in range(len(nll))])


@feature("surprise", higher_means="depends")
def token_length(trace) -> np.ndarray:
    """Count the characters that the token adds to the answer.

    Whether higher or lower means hallucinated depends on the model.
    """
    return np.array([end - start for start, end in trace.answer.offsets])


@feature("surprise", higher_means="grounded", requires=["attention"])
def attn_image_gain(trace) -> Tensor:
    """Compute the attention mass on the image in the last layer minus that in the first, in [-1, 1].

    Lower means hallucinated.
    """
    image = attn_image(trace)  # (tokens, layers); features are functions of a trace, so they can use each other
    return image[:, -1] - image[:, 0]

"""Summarise a picture's pixels in a few numbers, by which a monitor compares it with the pictures of a detector.

No model is needed, and no pass: the profile is the same for every model, question and answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image, Resampling

SIDE = 96
"""Rows and columns that a picture is resampled to, so that profiles of pictures of any size can be compared."""
_VALUES, _DETAILS = (0.05, 0.25, 0.5, 0.75, 0.95), (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # quantiles
_FLOOR = 1 / 255  # added to differences before the logarithm: smaller ones cannot be told from rounding
LENGTH = 3 * len(_DETAILS) + 2 * len(_VALUES) + 8


def picture_profile(picture: Image) -> np.ndarray:
    """Compute the profile of a picture, (``LENGTH``,) float64.

    Args:
        picture: any mode and size; resampled to ``SIDE`` x ``SIDE`` RGB pixels with values in [0, 1].

    Returns:
        Quantiles of neighbouring pixels' absolute differences to the right, down, and second ones to the right (natural
        logarithms); quantiles of all values; quantiles of the largest less the smallest channel; mean and standard
        deviation of each channel; share of fine detail that is common to the channels, as the ratio of medians and as
        the ratio of means.
    """
    small = picture.convert("RGB").resize((SIDE, SIDE), Resampling.BICUBIC)
    pixels = np.asarray(small, dtype=np.float64) / 255
    right, down = np.diff(pixels, axis=1), np.diff(pixels, axis=0)
    details = [np.quantile(np.abs(part), _DETAILS) for part in (right, down, np.diff(right, axis=1))]
    neighbours = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    fine = pixels[1:-1, 1:-1] - neighbours / 4
    common, whole = np.abs(fine.sum(-1)), np.abs(fine).sum(-1)
    shares = [np.median(common) / (np.median(whole) + _FLOOR), common.mean() / (whole.mean() + _FLOOR)]
    return np.concatenate(
        [
            np.log(np.concatenate(details) + _FLOOR),
            np.quantile(pixels, _VALUES),
            np.quantile(np.ptp(pixels, axis=-1), _VALUES),
            pixels.mean((0, 1)),
            pixels.std((0, 1)),
            shares,
        ]
    )


def profile_text(picture: Image) -> str:
    """Write a picture's profile as the text of the token table's column ``picture``: numbers between blanks."""
    return " ".join([f"{value:.6g}" for value in picture_profile(picture).tolist()])


def read_profiles(texts: Sequence[object]) -> np.ndarray:
    """Read profiles back, (texts, ``LENGTH``); rows of NaN where the text is missing or no profile.

    >>> read_profiles(["", None]).shape[0], bool(np.isnan(read_profiles(["0.25 -1.5"])).all())
    (2, True)
    """
    profiles = np.full((len(texts), LENGTH), np.nan)
    for row, text in enumerate(texts):
        try:
            values = np.array(text.split(), dtype=np.float64) if isinstance(text, str) else np.zeros(0)
        except ValueError:
            continue
        if len(values) == LENGTH and np.isfinite(values).all():
            profiles[row] = values
    return profiles

"""Profiles of pictures equal plain formulas, and go into text and back."""

import numpy as np
from PIL import Image

from stethoscope.core.picture_profile import PROFILE_LENGTH, picture_profile, profile_text, read_profiles


def test_profile_of_a_picture_goes_into_text_and_back():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    profile = picture_profile(picture)
    assert profile.shape == (PROFILE_LENGTH,)
    assert np.isfinite(profile).all()
    np.testing.assert_allclose(read_profiles([profile_text(picture)])[0], profile, rtol=1e-5)
    assert np.isnan(read_profiles([None, "", "1 2", "x " * PROFILE_LENGTH, np.nan])).all()


def test_profile_by_hand_of_a_flat_picture():
    profile = picture_profile(Image.new("RGB", (96, 96), (255, 0, 51)))
    np.testing.assert_allclose(profile[:18], np.log(1 / 255))
    np.testing.assert_allclose(profile[18:23], [0, 0, 0.2, 1, 1])
    np.testing.assert_allclose(profile[23:28], 1)
    np.testing.assert_allclose(profile[28:], [1, 0, 0.2, 0, 0, 0, 0, 0], atol=1e-12)


def test_profile_equals_the_plain_formulas():
    rng = np.random.default_rng(1)
    picture = Image.fromarray(
        rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) // np.arange(1, 97, dtype=np.uint8)[:, None, None]
    )
    pixels = np.asarray(picture) / 255
    right, down = np.diff(pixels, axis=1), np.diff(pixels, axis=0)
    details = [
        np.quantile(np.abs(part), (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)) for part in (right, down, np.diff(right, axis=1))
    ]
    around = (pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]) / 4
    fine = pixels[1:-1, 1:-1] - around
    common, whole = np.abs(fine.sum(-1)), np.abs(fine).sum(-1)
    values = [np.quantile(part, (0.05, 0.25, 0.5, 0.75, 0.95)) for part in (pixels, np.ptp(pixels, axis=-1))]
    shares = [mean(common) / (mean(whole) + 1 / 255) for mean in (np.median, np.mean)]
    parts = [np.log(np.concatenate(details) + 1 / 255), *values, pixels.mean((0, 1)), pixels.std((0, 1)), shares]
    np.testing.assert_allclose(picture_profile(picture), np.concatenate(parts), rtol=1e-10, atol=1e-12)

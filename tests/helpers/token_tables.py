"""Made-up token tables of which the right answer is known."""

import numpy as np
import pandas as pd

OBJECTS = np.array(["dog", "cat", "cup", "car"])


def token_table(images=200, seed=0, per_image=4, signal=1.5, prior=True):
    """Mentions with a label that depends on the features ``nll`` (up) and ``mass`` (down), and, with ``prior``, on
    position and object; between them tokens that name nothing."""
    rng = np.random.default_rng(seed)
    count = images * per_image * 2
    image = np.repeat(np.arange(images), per_image * 2)
    token = np.tile(np.arange(per_image * 2), images) * 3
    mention = token % 2 == 1
    kind = rng.integers(0, 4, count)
    logit = -1.2 + prior * (token / 12 + 0.8 * (kind - 1.5)) - prior * 0.8
    evidence = rng.normal(size=count)
    label = (rng.random(count) < 1 / (1 + np.exp(-logit - signal * evidence))).astype(int)
    number = np.tile(np.arange(per_image * 2) // 2, images)
    table = pd.DataFrame(
        {
            "task": "chair",
            "subset": "all",
            "sample_id": [f"chair/{i}" for i in image],
            "group": [f"image-{i}" for i in image],
            "token": token,
            "token_id": rng.integers(5, 500, count),
            "text": "x",
            "start": token,
            "end": token + 1,
            "label": np.where(mention, label, -1).astype(np.int8),
            "object": np.where(mention, OBJECTS[kind], ""),
            "mention_index": np.where(mention, number, -1),
            "repeat_index": np.where(mention, 0, -1),
            "is_first_subtoken": mention,
        }
    )
    features = {
        "nll": evidence + 0.3 * rng.normal(size=count),
        "mass": 0.5 - 0.1 * evidence + 0.1 * rng.normal(size=count),
        "noise": rng.normal(size=count),
        "position": token,
    }
    return table.assign(**{name: np.asarray(values, np.float32) for name, values in features.items()})


def halves(table):
    """The table's first and second half of images."""
    number = table["group"].str.split("-").str[1].astype(int)
    first = number < number.max() / 2
    return table[first], table[~first]

"""Check whether maps point at the named object, on the embedded scenes, where every box is known.

    python scripts/check/relevancy.py                      # scenes that neither the model nor its detector has seen
    python scripts/check/relevancy.py --scenes 60 --token  # relevancy in scope token beside it, the paper's definition

For the first mention of every object in a caption, these maps over the image tokens are read:

    row        relevancy of the token that begins the name, after the last layer, on the patches; and token
    mean       raw attention of the row that predicts that token, mean of all layers and heads
    head       the same of the single head that points best at the object on further pictures, a quarter as many
    layer      raw attention of the row of the name itself, of the layer that points best on these further pictures
    name       what runs without relevancy save: ``relevancy.heatmaps.name_attention``
    detector   where the detector sees the object (``Detector.locate``), if it reads image tokens

Printed with 95 % intervals over images:

    pointing   share of mentions whose strongest patch has its centre inside the box
    mass       share of the map inside the box, divided by the box's share of the picture (1 is chance)

against the box of the object itself (right mentions) and, as a control, against the box of another object that the
picture shows (right and hallucinated mentions). Last, with ``--token``, how far the default scope ``row`` is from
``token``: correlation of the two maps, mentions with the same most relevant patch, and L1 distance of the maps as a
share of the sum of the map in scope ``token``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

import stethoscope
from stethoscope import testbed
from stethoscope.core.types import required
from stethoscope.detection.detector import Detector
from stethoscope.metrics.bootstrap import mean_interval
from stethoscope.relevancy import answer_relevancy
from stethoscope.relevancy.heatmaps import name_attention
from stethoscope.testbed import Scene

QUESTION = "Please describe this image in detail."


def boxes(scene: Scene) -> dict[str, tuple[float, float, float, float]]:
    """Return left, upper, right and lower edge of what is seen of every object, as shares of the picture."""
    mask, edges = scene.mask(), {}
    for name in scene.visible:
        rows, columns = np.nonzero(mask == 1 + testbed.CATEGORIES.index(name))
        height, width = mask.shape
        edges[name] = (
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        )
    return edges


def inside(heat: np.ndarray, box: tuple[float, float, float, float]) -> tuple[float, float]:
    """Return whether the strongest patch's centre is in the box, and the mass inside it.

    The mass is divided by the box's share of the picture.

    A patch that the box cuts counts by the part that lies in it.

    >>> heat = np.zeros((4, 4)); heat[0, 0] = 1.0
    >>> inside(heat, (0.0, 0.0, 0.5, 0.25))
    (1.0, 8.0)
    """
    left, upper, right, lower = box
    rows, columns = heat.shape

    def covered(low: float, high: float, count: int) -> np.ndarray:
        edges = np.arange(count + 1) / count
        return (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(min=0) * count

    share = covered(upper, lower, rows)[:, None] * covered(left, right, columns)[None]
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    x, y = (column + 0.5) / columns, (row + 0.5) / rows
    hit = left <= x < right and upper <= y < lower
    area = (right - left) * (lower - upper)
    return float(hit), float((heat * share).sum() / max(heat.sum(), 1e-12) / area)


def heatmaps(adapter: Any, scene: Scene, detector: Detector, token: bool) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the objects that a caption names, and by kind their maps, (names, rows, columns)."""
    diagnosis = stethoscope.diagnose(adapter, scene.image(), QUESTION, detector=detector)
    first: dict[str, tuple[int, ...]] = {}
    for mention in diagnosis.mentions:
        first.setdefault(mention.object, mention.tokens)
    relevancy, attention = required(diagnosis.relevancy), required(diagnosis.attention)
    tokens, last = [tokens[0] for tokens in first.values()], [tokens[-1] for tokens in first.values()]
    if not first:
        return [], {}
    heats = {"row": required(relevancy.patches)[tokens, -1].double().numpy()}
    if token:
        encoded = adapter.encode(scene.image(), QUESTION)
        exact = answer_relevancy(adapter, encoded, diagnosis.answer, scope="token", layers="final", tokens=tokens)
        heats["token"] = required(exact.patches)[:, 0].double().numpy()
    means, side = attention.mean.double().numpy(), heats["row"].shape[1:]
    heats["mean"] = means[tokens].mean(1)
    heats["name"] = name_attention(means, last)
    if set(first) <= set(diagnosis.seen):
        heats["detector"] = np.stack([diagnosis.seen[name] for name in first])
    held = attention.heads[[attention.tokens.index(index) for index in tokens]].double().numpy()
    for layer, head in np.ndindex(*held.shape[1:3]):
        heats[f"head l{layer:02d}h{head:02d}"] = held[:, layer, head]
    for layer in range(means.shape[1]):
        heats[f"layer l{layer:02d}"] = means[np.minimum(np.array(last) + 1, len(means) - 1), layer]
    return list(first), {kind: values.reshape(-1, *side) for kind, values in heats.items()}


def judged(
    scene: Scene, adapter: Any, detector: Detector, rng: np.random.Generator, token: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row for every first mention, kind of map and box."""
    visible = boxes(scene)
    names, heats = heatmaps(adapter, scene, detector, token)
    for index, name in enumerate(names):
        others = [other for other in visible if other != name]
        about: dict[str, Any] = {"image": scene.id, "name": name}
        about["mention"] = "right" if name in visible else "hallucinated"
        targets = {"its own": name if name in visible else None, "another": rng.choice(others) if others else None}
        if token:
            row, exact = (heats[kind][index].ravel() for kind in ("row", "token"))
            about["alike"] = float(np.corrcoef(row, exact)[0, 1])
            about["same_patch"] = float(row.argmax() == exact.argmax())
            about["distance"] = float(np.abs(row - exact).sum() / max(exact.sum(), 1e-12))
        for kind, heat in heats.items():
            for box, target in targets.items():
                if target is not None:
                    hit, mass = inside(heat[index], visible[target])
                    yield {**about, "box": box, "map": kind, "pointing": hit, "mass": mass, "peak": heat[index].max()}


def with_best(table: pd.DataFrame, further: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with one head and one layer, those that point best on further pictures."""
    own = further[further["box"] == "its own"].groupby("map")["pointing"].mean()
    best = {str(own[own.index.str.startswith(kind)].idxmax()): kind for kind in ("head", "layer")}
    print(f"chosen on {further['image'].nunique()} further pictures: {', '.join(best)}")
    table = table.replace({"map": best})
    return table[~table["map"].str.match("(head|layer) ")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="number of scenes (default: %(default)s)")
    parser.add_argument("--first", type=int, default=3000, help="index of the first scene (default: %(default)s)")
    parser.add_argument("--token", action="store_true", help="relevancy in scope token too, most of the time")
    parser.add_argument("--detector", default=str(testbed.DETECTOR_DIR), help="its folder (default: the shipped one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adapter, rng = stethoscope.load("testbed"), np.random.default_rng(0)
    detector = Detector.load(options.detector)
    count = options.scenes
    scenes = testbed.scenes(options.first + count + max(count // 4, 1))[options.first :]
    tables = [
        pd.DataFrame([row for scene in part for row in judged(scene, adapter, detector, rng, token)])
        for part, token in ((scenes[:count], options.token), (scenes[count:], False))
    ]
    table = with_best(*tables)
    print(f"{'mention':<13} {'box':<8} {'map':<9} {'n':>5}  {'pointing':<22} mass")
    for (mention, box, kind), rows in table.groupby(["mention", "box", "map"]):
        pointing, mass = (
            mean_interval(rows[name].to_numpy(), rows["image"].to_numpy()) for name in ("pointing", "mass")
        )
        peak = f"  median of the largest value {rows['peak'].median():.3f}" if kind == "detector" else ""
        print(f"{mention:<13} {box:<8} {kind:<9} {len(rows):>5}  {pointing!s:<22} {mass}{peak}")
    if not options.token:
        return
    gaps = table.drop_duplicates(["image", "name"])
    alike, distance = gaps["alike"], gaps["distance"]
    print(f"correlation of the two scopes' maps: median {alike.median():.3f}, lowest tenth {alike.quantile(0.1):.3f}")
    print(f"the same most relevant patch: {int(gaps['same_patch'].sum())} of {len(gaps)} mentions")
    tenths = f"lowest and highest tenth {distance.quantile(0.1):.3f} and {distance.quantile(0.9):.3f}"
    print(f"L1 distance of row from token: median {distance.median():.3f}, {tenths}, largest {distance.max():.3f}")


if __name__ == "__main__":
    main()

"""Check whether relevancy points at the named object, on the embedded scenes, where every box is known.

    python scripts/check/relevancy.py                      # the scenes that the shipped model is judged on
    python scripts/check/relevancy.py --scenes 100

For the first mention of every object in a caption, the relevancy of the token that begins its name is read on the
patches, after the last layer; "mean" and "best" are raw attention to the image tokens: the mean of all layers and
heads, and the single head that points best at the object itself. Printed with 95 % intervals over images:

    pointing   share of mentions whose most relevant patch has its centre inside the box
    mass       share of the relevancy inside the box, divided by the box's share of the picture (1 is chance)

against the box of the object itself (right mentions) and, as a control, against the box of another object that the
picture shows (right and hallucinated mentions). Last, how far the default scope ``row`` is from ``token``, the paper's
definition: correlation of the two maps, mentions with the same most relevant patch, and L1 distance of the maps
as a share of the sum of the map in scope ``token``.
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
from stethoscope.core.types import Generation
from stethoscope.diagnosis.layers_pass import read_attention
from stethoscope.metrics.bootstrap import bootstrap
from stethoscope.relevancy import answer_relevancy
from stethoscope.tasks.chair import mentions
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
    """Return whether the strongest patch's centre is in the box, and the mass in it over its share of the picture.

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


def judged(scene: Scene, adapter: Any, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yield a row for every first mention, scope and box."""
    encoded = adapter.encode(scene.image(), QUESTION)
    [answer] = adapter.generate([encoded], Generation(max_new_tokens=128))
    first: dict[str, int] = {}
    for name, start, end in mentions(answer.text):
        first.setdefault(name, answer.covering(start, end)[0])
    if not first:
        return
    tokens, visible = list(first.values()), boxes(scene)
    heats = {}
    for scope in ("row", "token"):
        relevancy = answer_relevancy(adapter, encoded, answer, scope=scope, layers="final", tokens=tokens)
        heats[scope] = relevancy.patches[:, 0].double().numpy()
    attention = read_attention(adapter, encoded, answer, tokens)
    side = heats["row"].shape[1:]
    single = attention.heads.double().numpy()
    heats["mean"] = attention.mean[tokens].mean(1).double().numpy().reshape(-1, *side)
    for layer, head in np.ndindex(*attention.heads.shape[1:3]):
        heats[f"l{layer:02d}h{head:02d}"] = single[:, layer, head].reshape(-1, *side)
    for index, name in enumerate(first):
        others = [other for other in visible if other != name]
        kind = "right" if name in visible else "hallucinated"
        targets = {"its own": name if name in visible else None, "another": rng.choice(others) if others else None}
        row, token = (heats[scope][index].ravel() for scope in ("row", "token"))
        gap = {
            "alike": float(np.corrcoef(row, token)[0, 1]),
            "same_patch": float(row.argmax() == token.argmax()),
            "distance": float(np.abs(row - token).sum() / max(token.sum(), 1e-12)),
        }
        for scope, heat in heats.items():
            for box, target in targets.items():
                if target is not None:
                    hit, mass = inside(heat[index], visible[target])
                    about = {"image": scene.id, "mention": kind, "box": box, "scope": scope}
                    yield {**about, "pointing": hit, "mass": mass, **gap, "name": name}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="number of scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adapter, rng = stethoscope.load("testbed"), np.random.default_rng(0)
    table = pd.DataFrame([row for scene in testbed.scenes(options.scenes) for row in judged(scene, adapter, rng)])
    own = table[table["scope"].str.match("l\\d") & (table["box"] == "its own")]
    best = str(own.groupby("scope")["pointing"].mean().idxmax())
    table = table[table["scope"].isin(["row", "token", "mean", best])].replace({"scope": {best: "best"}})
    print(f"the best head is {best}")
    mean = lambda labels, scores, weights: (weights * scores).sum(-1) / weights.sum(-1)  # noqa: E731
    print(f"{'mention':<13} {'box':<8} {'scope':<6} {'n':>5}  {'pointing':<22} mass")
    for (mention, box, scope), rows in table.groupby(["mention", "box", "scope"]):
        pointing, mass = (
            bootstrap(mean, rows["pointing"].to_numpy(), rows[name].to_numpy(), rows["image"].to_numpy())
            for name in ("pointing", "mass")
        )
        print(f"{mention:<13} {box:<8} {scope:<6} {len(rows):>5}  {pointing!s:<22} {mass}")
    gaps = table.drop_duplicates(["image", "name"])
    alike, distance = gaps["alike"], gaps["distance"]
    print(f"correlation of the two scopes' maps: median {alike.median():.3f}, lowest tenth {alike.quantile(0.1):.3f}")
    print(f"the same most relevant patch: {int(gaps['same_patch'].sum())} of {len(gaps)} mentions")
    tenths = f"lowest and highest tenth {distance.quantile(0.1):.3f} and {distance.quantile(0.9):.3f}"
    print(f"L1 distance of row from token: median {distance.median():.3f}, {tenths}, largest {distance.max():.3f}")


if __name__ == "__main__":
    main()

"""One token of a diagnosis as a matplotlib figure."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.diagnosis.parts import SHARES
from stethoscope.relevancy.heatmaps import colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stethoscope.diagnosis.result import Diagnosis


@cache
def _shown_by_notebooks() -> type[Figure]:
    """Figures that notebooks show by themselves; matplotlib's own need ``%matplotlib inline`` for that."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=80)
            return file.getvalue()

    return Shown


def figure(diagnosis: Diagnosis, token: int, layer: int = -1, raw: bool | None = None) -> Figure:
    """See ``Diagnosis.plot``. The figure belongs to no window; notebooks show it, ``savefig`` writes it."""
    heat = diagnosis.heat_map(token, layer, raw)
    made = _shown_by_notebooks()(figsize=(12, 4), layout="constrained")
    picture, parts, rank = made.subplots(1, 3, width_ratios=(1.2, 1, 1))
    picture.imshow(diagnosis.image)
    top = heat.max()
    strength = heat / top if top > 0 else heat
    picture.imshow(colours(strength), alpha=0.75 * np.sqrt(strength))
    picture.set_axis_off()
    word = diagnosis.answer.tokens[token].strip()
    title = f"{word!r}, probability {diagnosis.probability[token]:.0%}"
    mention = diagnosis.mention_of(token)
    if mention is not None and mention.judgement is not None:
        title += f", hallucinated {mention.judgement.probability:.0%}"
    picture.set_title(title.replace("$", r"\$"))  # which would begin a formula
    layers = np.arange(1, len(diagnosis.shares["image"][token]) + 1)
    parts.stackplot(layers, [diagnosis.shares[name][token] for name in SHARES], labels=SHARES)
    parts.set(xlabel="layer", ylabel="share of relevancy", ylim=(0, 1))
    parts.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(SHARES), fontsize="small", frameon=False)
    for axis in (parts.xaxis, rank.xaxis, rank.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if diagnosis.evolution is not None:
        values = diagnosis.evolution.rank[token] + 1
        rank.plot(np.arange(1, len(values) + 1), values, marker="o")
        rank.set(xlabel="layer", ylabel="rank of the token, 1 is best", ylim=(values.max() + 0.5, 0.5))
        if values.max() > 20:
            rank.set(yscale="log", ylim=(2 * values.max(), 0.8))
    else:
        rank.set_axis_off()
    return made

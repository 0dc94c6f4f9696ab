"""Add a detector: here one that reads only the columns with the best AUROC on its training images.

    PYTHONPATH=examples stethoscope train --config-dir examples/conf plugins=[custom_detector] \
        run=runs/first detector=few_columns detector.count=4
"""

from typing import Self

import numpy as np
import pandas as pd

from stethoscope import Detector
from stethoscope.core.token_table import feature_names
from stethoscope.metrics.classification import auroc


class FewColumns(Detector):
    """Choose ``count`` columns by their AUROC on the training images, then fit as usual.

    The chosen columns are in the manifest; the saved detector is loaded like any other, without this module.
    """

    def __init__(self, count: int = 8, **settings) -> None:
        super().__init__(**settings)
        self.count = count

    def fit(self, train: pd.DataFrame, calibration: pd.DataFrame | None = None) -> Self:
        """Choose the columns, then fit on these alone."""
        rows = self.select_mentions(train)  # one row for every mention that has a label
        labels = rows["label"].to_numpy(dtype=int)
        names = [name for name in feature_names(rows) if rows[name].notna().all()]
        deviations = [abs(auroc(labels, rows[name].to_numpy(dtype=float)) - 0.5) for name in names]
        best = np.argsort(deviations)[::-1][: self.count]
        self.settings["features"] = sorted(names[index] for index in best)
        return super().fit(train, calibration)

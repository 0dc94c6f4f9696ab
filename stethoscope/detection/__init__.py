"""From token tables to calibrated warnings: classifiers, baselines, published methods, risk control, comparisons."""

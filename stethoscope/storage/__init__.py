"""The run directory on disk: records, token rows, heat maps, fingerprints, locks."""

"""Models in the format of their authors, which transformers does not read."""

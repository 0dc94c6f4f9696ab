"""Classification metrics and cluster bootstrap."""

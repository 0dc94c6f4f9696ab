"""Model adapters, one file per family; configuration names them, nothing else does."""

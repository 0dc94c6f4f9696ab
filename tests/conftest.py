"""Being here, this file puts ``tests/`` on the import path, for the helpers that several tests share."""

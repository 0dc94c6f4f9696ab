"""``python -m stethoscope`` is the command ``stethoscope``."""

from stethoscope.cli import main

main()

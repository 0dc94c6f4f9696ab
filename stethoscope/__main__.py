"""``python -m stethoscope`` is the command ``stethoscope``."""

from stethoscope.cli import main

if __name__ == "__main__":
    main()

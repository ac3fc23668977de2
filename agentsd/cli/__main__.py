"""``python -m agentsd.cli`` is the command ``agentsd``."""

from . import main

if __name__ == "__main__":
    main()

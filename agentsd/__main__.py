"""``python -m agentsd`` is the command ``agentsd``."""

from .cli import main

if __name__ == "__main__":
    main()

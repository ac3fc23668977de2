"""The web demo: the same as ``agentsd app``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])

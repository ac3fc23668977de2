"""Make images from a prompt: the same as ``agentsd generate``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])

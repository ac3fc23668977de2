"""CLIP score of images with their prompts: the same as ``agentsd evaluate clip-score``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["evaluate", "clip-score", *sys.argv[1:]])

"""CLIP score of images with their prompts: the same as ``agentsd evaluate score --clip-score``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["evaluate", "score", "--clip-score", *sys.argv[1:]])

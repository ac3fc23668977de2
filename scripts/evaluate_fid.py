"""Fréchet inception distance of two sets of images: the same as ``agentsd evaluate fid``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["evaluate", "fid", *sys.argv[1:]])

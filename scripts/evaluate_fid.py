"""Fréchet inception distance of two image sets: the same as ``agentsd evaluate score --fid``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["evaluate", "score", "--fid", *sys.argv[1:]])

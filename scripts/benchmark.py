"""Time a UNet unpatched and patched: the same as ``agentsd benchmark``."""

import sys

from agentsd.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])

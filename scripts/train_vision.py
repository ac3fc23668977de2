"""Train the vision models of agentsd.nn.

    # the published recipe on ImageNet, by timm's own train.py, here on 8 devices
    torchrun --nproc-per-node 8 scripts/train_vision.py imagenet agent_deit_tiny \\
        --timm-train pytorch-image-models/train.py --data-dir /data/imagenet --amp
    # agents against softmax attention on the pocket world, minutes on a CPU
    python scripts/train_vision.py scenes
    # time and memory of one layer
    python scripts/train_vision.py cost

Needs `pip install "agentsd[vision]"`, and `imagenet` a checkout of timm's repository: its train.py
is not part of the package. Figures go to stdout as JSON, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vision.recipe import RECIPES, train_arguments


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; `imagenet` passes unknown options on to timm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    imagenet = commands.add_parser("imagenet", help="train as published, by timm's train.py")
    imagenet.add_argument("model", choices=RECIPES)
    imagenet.add_argument("--timm-train", type=Path, required=True, metavar="TRAIN.PY")
    imagenet.add_argument("--batch-size", type=int, default=128, help="images per device")
    imagenet.add_argument("--dry-run", action="store_true", help="only show timm's arguments")
    scenes = commands.add_parser("scenes", help="agents against softmax on pocket scenes")
    scenes.add_argument("--work", type=Path, default=Path(".training/vision"), help="checkpoints")
    scenes.add_argument("--seeds", type=int, default=2)
    scenes.add_argument("--steps", type=int, default=1500)
    scenes.add_argument("--judged", type=int, default=1000, help="unseen scenes")
    cost = commands.add_parser("cost", help="time and memory of one layer")
    cost.add_argument("--sides", type=int, nargs="+", default=[28, 56, 112])
    cost.add_argument("--repeats", type=int, default=6)
    given, rest = parser.parse_known_args()
    if rest and given.command != "imagenet":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return given, rest


def main() -> None:
    """Run the chosen command."""
    given, rest = arguments()
    if given.command == "imagenet":
        processes = int(os.environ.get("WORLD_SIZE", 1))
        # What the user gives comes last, so that it overrides the recipe.
        passed = [*train_arguments(given.model, given.batch_size, processes), *rest]
        if given.dry_run:
            print(*passed)
            return
        if not given.timm_train.is_file():
            raise SystemExit(
                f"error: {given.timm_train} is not a file; clone timm's repository "
                "(pytorch-image-models) and give the path of its train.py"
            )
        import agentsd.nn  # noqa: F401  # registers the models

        sys.argv = [str(given.timm_train), *passed]
        runpy.run_path(str(given.timm_train), run_name="__main__")
    elif given.command == "scenes":
        from vision.scenes import VARIANTS, Run, compare

        seeds = range(given.seeds)
        runs = [Run(name, seed, steps=given.steps) for seed in seeds for name in VARIANTS]
        print(json.dumps(compare(runs, given.work, given.judged), indent=2))
    else:
        from vision.cost import measure

        print(json.dumps(measure(given.sides, given.repeats), indent=2))


if __name__ == "__main__":
    main()

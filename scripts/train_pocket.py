"""Train the pocket model from scratch into a folder that diffusers loads.

    python scripts/train_pocket.py                            # everything, into agentsd/pocket
    python scripts/train_pocket.py --stage unet               # train or continue the denoiser alone
    python scripts/train_pocket.py --smoke --out /tmp/pocket  # try the machinery, under a minute

Stages leave checkpoints in the work folder and resume from them, even after a kill. Autoencoder and
CLIP are trained for a time, the denoiser for a number of samples; raise either to train further.
Without checkpoints of their own, autoencoder and CLIP come from the exported model.
Figures go to stdout as JSON, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pocket.checkpoints import load
from pocket.clip import build_clip, train_clip
from pocket.export import assemble, export
from pocket.preview import Preview
from pocket.progress import say
from pocket.scores import score, show, tries
from pocket.settings import Settings
from pocket.tokenizer import build_tokenizer
from pocket.unet import Trainer, train_unet
from pocket.vae import build_vae, train_vae

from agentsd.models.quiet import quiet_loading

STAGES = ("vae", "clip", "unet", "export", "score", "trials", "samples")
SHARES = {"vae": 0.4, "clip": 0.6}  # of the hours, among the stages chosen


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=("all", *STAGES), default=["all"])
    parser.add_argument(
        "--hours", type=float, default=1.0, help="training time of autoencoder and CLIP"
    )
    parser.add_argument(
        "--samples", type=int, default=120_000, help="pictures that the denoiser sees in all"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, default=Path("agentsd/pocket"), help="the exported model"
    )
    parser.add_argument("--work", type=Path, default=Path(".training"), help="checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=min(4, os.cpu_count() or 1), help="CPU cores"
    )
    parser.add_argument(
        "--save-every", type=float, default=180.0, help="seconds between checkpoints"
    )
    parser.add_argument("--steps", type=int, default=0, help="last step of each stage, 0: by time")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--smoke", action="store_true", help="a few steps at the smallest sizes")
    parser.add_argument("--images", type=int, default=512, help="images that the score generates")
    return parser.parse_args()


@quiet_loading()
def main() -> None:
    """Run the chosen stages in order."""
    given = arguments()
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(given.threads)
    settings = Settings(
        out=given.out,
        work=given.work,
        device=torch.device(device),
        seed=given.seed,
        smoke=given.smoke,
        steps=given.steps,
        save_every=given.save_every,
        resume=given.resume,
        workers=max(0, (os.cpu_count() or 1) - 2) if device == "cuda" else 0,
        shards=given.threads,
    )
    settings.prepare()
    stages = STAGES if "all" in given.stage else tuple(s for s in STAGES if s in given.stage)
    trained = {stage: SHARES[stage] for stage in stages if stage in SHARES}
    seconds = {
        s: given.hours * 3600 * share / sum(trained.values()) for s, share in trained.items()
    }

    tokenizer = build_tokenizer(settings.work / "tokenizer")
    if "vae" in stages:
        train_vae(settings, seconds["vae"])
    if "clip" in stages:
        train_clip(settings, seconds["clip"])
    if "unet" in stages or "export" in stages:
        vae, clip = _vae(settings), _clip(settings)
    if "unet" in stages:
        train_unet(settings, given.samples, clip, tokenizer, Preview(settings, clip, vae))
    if "export" in stages:
        trainer = Trainer(settings, clip, tokenizer, given.samples)
        saved = load(settings.work / "unet.pt", settings.device)
        if saved is None:
            raise SystemExit(f"error: {settings.work} has no denoiser; run --stage unet first")
        trainer.restore(saved)
        trainer.average.swap()
        pipe = assemble(trainer.unet, trainer.text, vae, tokenizer)
        say(f"export: {export(settings, pipe.to('cpu'), clip.cpu())}")
    if "score" in stages:
        print(json.dumps(score(settings, generated=given.images), indent=2))
    if "trials" in stages:
        print(json.dumps(tries(settings), indent=2, ensure_ascii=False))
    if "samples" in stages and not settings.smoke:
        show(settings)


def _vae(settings: Settings) -> AutoencoderKL:
    """The autoencoder of the work folder, or else of the exported model."""
    saved = load(settings.work / "vae.pt", settings.device)
    if saved is None:
        return AutoencoderKL.from_pretrained(_exported(settings, "vae"), dtype=torch.float32)
    vae = build_vae()
    vae.load_state_dict(saved["model"])
    return vae


def _clip(settings: Settings) -> CLIPModel:
    """The CLIP of the work folder, or else of the exported model."""
    saved = load(settings.work / "clip.pt", settings.device)
    if saved is None:
        return CLIPModel.from_pretrained(_exported(settings, "clip"))
    clip = build_clip(build_tokenizer(settings.work / "tokenizer"))
    clip.load_state_dict(saved["model"])
    return clip


def _exported(settings: Settings, part: str) -> Path:
    folder = settings.out / part
    if not folder.is_dir():
        raise SystemExit(
            f"error: neither {settings.work} nor {settings.out} has a {part}; "
            f"run --stage {part} first"
        )
    return folder


if __name__ == "__main__":
    main()

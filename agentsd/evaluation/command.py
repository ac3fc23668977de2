"""The ``agentsd evaluate`` commands: measure sets of images, and run whole experiments."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import EvaluationError
from ..progress import Bar

if TYPE_CHECKING:
    from .features import Features
    from .image_sets import ImageEntry
    from .intervals import Interval
    from .reading import ReadOptions

app = typer.Typer(
    no_args_is_help=True,
    help="Measure sets of images: FID, KID, CLIP score, likeness; run whole experiments.",
)
stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

Images = Annotated[
    str, typer.Argument(help="A folder of images, one that agentsd made, or a webdataset .tar.")
]
Reference = Annotated[
    str, typer.Argument(help="What to compare with: likewise, or statistics (.npz, pytorch-fid's).")
]
FeatureName = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="inception[:FILE], clip:MODEL or pocket.",
        show_default="pocket for images of the pocket model, else inception",
    ),
]
ClipName = Annotated[
    str | None,
    typer.Option(
        "--clip",
        help="clip:MODEL (a folder or hub id) or pocket.",
        show_default="pocket for images of the pocket model, else CLIP ViT-B/16",
    ),
]
Size = Annotated[
    int | None, typer.Option(min=16, max=4096, help="Crop and resize all images to this side.")
]
Convert = Annotated[
    bool, typer.Option("--convert", help="Take grey, CMYK and transparent images, as RGB.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that cannot be used, and report them.")
]
Unfinished = Annotated[
    bool,
    typer.Option("--unfinished", help="Measure the images that are there of an unfinished run."),
]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Of features.", show_default="~/.cache/agentsd")
]
Device = Annotated[str | None, typer.Option(help="cuda, mps, cpu, …", show_default="the best")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("fid")
def fid_command(
    images: Images,
    reference: Reference,
    features: FeatureName = None,
    infinity: Annotated[
        bool, typer.Option("--infinity", help="Also FID extrapolated to infinitely many images.")
    ] = False,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Fréchet inception distance, with its standard error."""
    from .features.statistics import load_statistics
    from .metrics import fid, fid_bias_warning, fid_infinity

    sets = _Sets(features, size, convert, skip_bad, unfinished, cache, device)
    ours = sets.of(images)
    theirs = load_statistics(reference) if reference.endswith(".npz") else sets.of(reference).values
    found = fid(ours.values, theirs)
    if note := fid_bias_warning(len(ours.values), ours.values.shape[1]):
        _note(note)
    result = {"fid": found.value, "error": found.error, "interval": list(found.interval[1:])}
    if infinity:
        far = fid_infinity(ours.values, theirs)
        result |= {"fid_infinity": far.mean, "fid_infinity_interval": list(far[1:])}
    told = f"FID {found.value:.4g} ± {found.error:.2g}"
    if infinity:
        told += f"; at infinitely many images {_told(far)}"
    sets.show(result, told, as_json)


@app.command("kid")
def kid_command(
    images: Images,
    reference: Reference,
    features: FeatureName = None,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Kernel inception distance, with its standard error; unbiased at any number of images."""
    from .intervals import SMALL_SAMPLE
    from .metrics import kid

    sets = _Sets(features, size, convert, skip_bad, unfinished, cache, device)
    both = sets.of(images).values, sets.of(_no_statistics(reference)).values
    if (least := min(map(len, both))) < SMALL_SAMPLE:
        _note(f"{least} images are too few for KID; {SMALL_SAMPLE} are the least")
    found = kid(*both)
    result = {"kid": found.value, "error": found.error, "interval": list(found.interval[1:])}
    sets.show(result, f"KID {found.value:.4g} ± {found.error:.2g}", as_json)


@app.command("precision-recall")
def precision_recall_command(
    images: Images,
    reference: Reference,
    features: FeatureName = None,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Improved precision and recall (k = 3), with bootstrap intervals."""
    from .intervals import bootstrap
    from .metrics import precision_recall

    sets = _Sets(features, size, convert, skip_bad, unfinished, cache, device)
    parts = precision_recall(sets.of(images).values, sets.of(_no_statistics(reference)).values)
    [precision], [recall] = map(bootstrap, parts)
    result = {
        "precision": precision.mean,
        "precision_interval": list(precision[1:]),
        "recall": recall.mean,
        "recall_interval": list(recall[1:]),
    }
    sets.show(result, f"precision {_told(precision)}; recall {_told(recall)}", as_json)


@app.command("statistics")
def statistics_command(
    images: Images,
    out: Annotated[Path, typer.Argument(help="The .npz to write.")],
    features: FeatureName = None,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write the statistics of a set for FID, in pytorch-fid's format."""
    from .features.statistics import save_statistics
    from .metrics import feature_statistics

    if out.suffix != ".npz":
        raise EvaluationError(f"{out}: statistics are written as .npz")
    sets = _Sets(features, size, convert, skip_bad, unfinished, cache, device)
    save_statistics(out, feature_statistics(sets.of(images).values))
    sets.show({"file": str(out)}, str(out), as_json)


@app.command("clip-score")
def clip_score_command(
    images: Images,
    clip: ClipName = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line, where the images bring none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write each image's score, as JSON lines.")
    ] = None,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """CLIP score (100 times the cosine of image and prompt), with a bootstrap interval."""
    from ..generation.image_files import write_whole
    from .features import load_clip
    from .image_sets import read_image_set, with_prompts
    from .intervals import bootstrap
    from .metrics import clip_score

    found = read_image_set(images, unfinished=unfinished)
    found = with_prompts(found, prompts) if prompts else found
    without = [picture.name for picture in found if picture.prompt is None]
    if without:
        raise EvaluationError(
            f"{len(without)} of {len(found)} images have no prompt, such as {without[0]}; give "
            "--prompts FILE, one a line, or NAME.txt beside each image"
        )
    name = clip or ("pocket" if _is_pocket(found) else DEFAULT_CLIP)
    sets = _Sets(name, size, convert, skip_bad, unfinished, cache, device)
    model = load_clip(name, sets.device)
    ours = sets.extracted(found, model)
    texts = [str(picture.prompt) for picture in ours.images]
    embedded, cut = model.embed_texts(texts)
    scores = clip_score(ours.values, embedded)
    if cut:
        _note(f"{len(cut)} of {len(texts)} prompts are longer than CLIP reads; it saw their start")
    [mean] = bootstrap(scores, texts)
    if out:
        rows = [
            {"image": p.name, "prompt": p.prompt, "seed": p.seed, "clip_score": float(s)}
            for p, s in zip(ours.images, scores, strict=True)
        ]
        write_whole(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    _note_small_sample_warning(texts)
    result = {"clip_score": mean.mean, "interval": _ends(mean), "prompts_cut": len(cut)}
    sets.show(result, f"CLIP score {_told(mean)}", as_json)


@app.command("paired")
def paired_command(
    images: Images,
    reference: Annotated[str, typer.Argument(help="The images to be like, with the same names.")],
    clip: ClipName = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for each pair's figures and the worst ten.")
    ] = None,
    size: Size = None,
    convert: Convert = False,
    skip_bad: SkipBad = False,
    unfinished: Unfinished = False,
    cache: CacheFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Likeness to images of the same prompts and seeds: PSNR, SSIM, cosine of CLIP embeddings."""
    import numpy as np

    from ..generation.image_files import prepare_folder, save_image, write_whole
    from .contact_sheet import worst_pairs
    from .features import load_clip, lpips
    from .image_sets import HIDDEN, read_image_set
    from .intervals import bootstrap
    from .pairs import compare_pairs, pair_images

    both = pair_images(
        read_image_set(images, unfinished=unfinished),
        read_image_set(_no_statistics(reference), unfinished=unfinished),
    )
    found = [pair for pair in both if not (pair.image.hidden or pair.reference.hidden)]
    if not found:
        raise EvaluationError(f"{HIDDEN}: an image of each of {len(both)} pairs")
    name = clip or ("pocket" if _is_pocket([p.image for p in found]) else DEFAULT_CLIP)
    sets = _Sets(name, size, convert, skip_bad, unfinished, cache, device)
    judges: dict[str, Any] = {"clip": load_clip(name, sets.device), "lpips": lpips.load_if_cached()}
    if judges["lpips"] is None:
        _note(f"LPIPS is left out; its weights ({lpips.weights_file()}) are not there")
    sets.hidden = len(both) - len(found)
    with _bar("pairs", len(found)) as bar:
        rows, sets.bad = compare_pairs(
            found, options=sets.reading, folder=cache, progress=bar.show, **judges
        )
    labels = [row["prompt"] or row["image"] for row in rows]
    _note_small_sample_warning(labels)
    result: dict[str, Any] = {"pairs": len(rows)}
    told = []
    for figure, unit in (("psnr", " dB"), ("ssim", ""), ("cosine", ""), ("lpips", "")):
        if figure not in rows[0]:
            continue
        values = [row[figure] for row in rows]
        [mean] = bootstrap(values, labels)
        quantiles = [float(q) for q in np.quantile(values, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))]
        result[figure] = {"mean": mean.mean, "interval": _ends(mean), "quantiles": quantiles}
        told.append(f"{figure} {_told(mean)}{unit}, median {quantiles[3]:.4g}")
    if out:
        prepare_folder(out)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(out / "likeness.jsonl", lines.encode())
        write_whole(out / "likeness.json", json.dumps(result, indent=2).encode())
        save_image(worst_pairs(found, rows), out / "worst.png")
    sets.show(result, "\n".join(told), as_json)


@app.command("run")
def run_command(
    protocol: Annotated[str, typer.Argument(help="A YAML file, or 'pocket', 'imagenet2k'.")],
    out: Annotated[Path, typer.Option(help="Folder for images and report; what is there is kept.")],
    quick: Annotated[bool, typer.Option("--quick", help="Its cut of a few minutes.")] = False,
    model: Annotated[str | None, typer.Option(help="Another model than it says.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images for FID and KID, as for 'fid'.")
    ] = None,
    cache: CacheFolder = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="the model's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment: make what is missing, measure it, write report.html and report.json."""
    from ..generation.image_files import prepare_folder
    from ..models.loading import hide_loading_bars, load_pipeline
    from . import experiment, report
    from .protocol import load_protocol

    plan = load_protocol(protocol, quick=quick, model=model, reference=reference)
    report.require_packages()
    prepare_folder(out)
    hide_loading_bars()
    pipe = load_pipeline(plan.model, device=device, dtype=dtype)
    with ExitStack() as phase:
        bars: dict[str, Bar] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                phase.close()  # one after another
                bars[what] = phase.enter_context(_bar(what, total, done))
            bars[what].show(done)

        found = experiment.run(plan, out, pipe, cache=cache, progress=progress)
    _show_report(found, report.write(found, out), as_json)


@app.command("report")
def report_command(
    out: Annotated[Path, typer.Argument(help="Folder that an experiment ran in.")],
    as_json: AsJson = False,
) -> None:
    """Write an experiment's report.html again, from its report.json and images."""
    from . import report

    found = report.load(out)
    _show_report(found, report.write(found, out), as_json)


def _show_report(found: dict[str, Any], page: Path, as_json: bool) -> None:
    from .report import markdown

    for note in found["notes"]:
        _note(note)
    without = {key: value for key, value in found.items() if key != "values"}
    told = json.dumps(without) if as_json else f"{markdown(found)}\n{page}"
    stdout.print(told, markup=False)


DEFAULT_CLIP = "clip:openai/clip-vit-base-patch16"
"""For images of other models than the pocket one; from the hub, or its cache."""


class _Sets:
    """Loads one extractor for the sets of a command, reads them, and prints the result."""

    def __init__(
        self,
        features: str | None,
        size: int | None,
        convert: bool,
        skip_bad: bool,
        unfinished: bool,
        cache: Path | None,
        device: str | None,
    ):
        from ..models.loading import hide_loading_bars, target_device
        from .reading import ReadOptions

        hide_loading_bars()
        self.features = features
        self.device = target_device(device)
        self.reading: ReadOptions = ReadOptions(size, convert, skip_bad)
        self.unfinished = unfinished
        self.cache = cache
        self.extractor: Any = None
        self.bad: list[str] = []
        self.hidden = 0
        self.used: dict[str, Any] = {}

    def of(self, source: str) -> Features:
        """The features of a source, by the extractor that suits the first one."""
        from .features import load_extractor
        from .image_sets import read_image_set

        found = read_image_set(source, unfinished=self.unfinished)
        if self.extractor is None:
            self.features = self.features or ("pocket" if _is_pocket(found) else "inception")
            self.extractor = load_extractor(self.features, self.device)
        return self.extracted(found, self.extractor)

    def extracted(self, found: list[ImageEntry], model: Any) -> Features:
        from .features import extract
        from .image_sets import visible

        shown = visible(found)
        self.hidden += len(found) - len(shown)
        with _bar("images", len(shown)) as bar:
            got = extract(shown, model, self.reading, folder=self.cache, progress=bar.show)
        self.bad += got.skipped
        self.used.setdefault("images", len(got.images))
        return got

    def show(self, result: dict[str, Any], told: str, as_json: bool) -> None:
        """The result on stdout; what was left out on stderr, too."""
        from .image_sets import HIDDEN

        for problem in self.bad:
            _note(f"left out: {problem}")
        if self.hidden:
            _note(f"left out: {self.hidden} {HIDDEN}")
        settings = {"features": self.features, "reading": asdict(self.reading), "bad": self.bad}
        whole = {**result, **self.used, **settings, "hidden": self.hidden}
        stdout.print(json.dumps(whole) if as_json else told, markup=False)


def _no_statistics(reference: str) -> str:
    if reference.endswith(".npz"):
        raise EvaluationError(f"{reference}: statistics serve FID alone; give the images")
    return reference


def _is_pocket(found: list[ImageEntry]) -> bool:
    return all(picture.model == "pocket" for picture in found)


def _told(found: Interval) -> str:
    if not math.isfinite(found.low):
        return f"{found.mean:.4g} (of one prompt, without interval)"
    return f"{found.mean:.4g} [{found.low:.4g}, {found.high:.4g}]"


def _ends(found: Interval) -> list[float] | None:
    """For JSON, which knows no infinity."""
    return [found.low, found.high] if math.isfinite(found.low) else None


def _note_small_sample_warning(prompts: list[str]) -> None:
    from .intervals import small_sample_warning

    if note := small_sample_warning(prompts):
        _note(note)


def _note(text: str) -> None:
    stderr.print(f"note: {text}", style="yellow", markup=False)


def _bar(what: str, total: int, done: int = 0) -> Bar:
    how = "rich" if stderr.is_terminal else "plain"
    return Bar(how, total, done, stderr, what)

"""``agentsd evaluate``: measure image sets; :mod:`.experiment` has its experiments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from . import experiment
from .console import note, progress_bar, show
from .options import AsJson, CacheFolder, Device, with_option_groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..evaluation.compared_sets import ComparedSets
    from ..evaluation.measure import Figure

evaluate = typer.Typer(
    no_args_is_help=True,
    help="Measure image sets (FID, KID, precision and recall, CLIP score, similarity of pairs) and "
    "run whole experiments.",
)

Images = Annotated[
    str, typer.Argument(help="A folder of images, an agentsd run, or a webdataset .tar.")
]
FeatureName = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="Extractor: inception[:FILE], clip:MODEL or pocket.",
        show_default="pocket for images of the pocket model, else inception",
    ),
]


@dataclass
class MeasureOptions:
    """How image sets are read, and how results are printed."""

    size: Annotated[
        int | None,
        typer.Option(min=16, max=4096, help="Crop to a square and resize to this side in pixels."),
    ] = None
    convert: Annotated[
        bool, typer.Option("--convert", help="Convert grey, CMYK and transparent images to RGB.")
    ] = False
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images that cannot be used, and list them.")
    ] = False
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Measure the existing images of an unfinished run.")
    ] = False
    cache: CacheFolder = None
    device: Device = None
    as_json: AsJson = False

    def open(self, images: str, reference: str | None = None, **given: Any) -> ComparedSets:
        """The sets to measure."""
        from ..evaluation.compared_sets import ComparedSets
        from ..evaluation.reading import ReadOptions

        return ComparedSets(
            images,
            reference,
            reading=ReadOptions(self.size, self.convert, self.skip_bad),
            unfinished=self.unfinished,
            cache=self.cache,
            device=self.device,
            note=note,
            progress=_progress,
            **given,
        )

    def show(self, sets: ComparedSets, figure: Figure) -> None:
        """Print the measurements, and note what was left out."""
        sets.note_left_out()
        show({**figure.values, **sets.context()}, figure.text, self.as_json)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress_bar(what, total) as bar:
        yield bar.show


@evaluate.command()
@with_option_groups
def score(
    images: Images,
    reference: Annotated[
        str | None,
        typer.Argument(
            help="Images to compare with, in the same forms, or FID statistics (.npz from "
            "pytorch-fid)."
        ),
    ] = None,
    *,
    fid: Annotated[bool, typer.Option("--fid", help="Fréchet inception distance.")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel inception distance.")] = False,
    precision_recall: Annotated[
        bool, typer.Option("--precision-recall", help="Improved precision and recall (k = 3).")
    ] = False,
    clip_score: Annotated[
        bool, typer.Option("--clip-score", help="Agreement of images with their prompts.")
    ] = False,
    paired: Annotated[
        bool, typer.Option("--paired", help="Similarity to images of the same prompts and seeds.")
    ] = False,
    infinity: Annotated[
        bool, typer.Option("--infinity", help="Also extrapolate FID to infinitely many images.")
    ] = False,
    features: FeatureName = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="clip:MODEL (a folder or hub id) or pocket.",
            show_default="pocket for images of the pocket model, else CLIP ViT-B/16",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one per line, for images that have none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results of each image and each pair.")
    ] = None,
    options: MeasureOptions,
) -> None:
    """Measure an image set: the metrics chosen by flags, or all that can be measured."""
    from ..evaluation import measure

    sets = options.open(images, reference, features=features, clip=clip, prompts=prompts)
    asked = {
        "fid": fid,
        "kid": kid,
        "precision_recall": precision_recall,
        "clip_score": clip_score,
        "paired": paired,
    }
    names = [name for name, wanted in asked.items() if wanted] or measure.measurable(sets)
    if infinity and "fid" not in names:
        raise SettingsError("--infinity extrapolates FID, which is not measured; add --fid")
    options.show(sets, measure.measure_all(sets, names, infinity=infinity, out=out))


@evaluate.command("statistics")
@with_option_groups
def statistics_command(
    images: Images,
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    *,
    features: FeatureName = None,
    options: MeasureOptions,
) -> None:
    """Write the statistics of an image set for FID, in pytorch-fid's format."""
    from ..evaluation.measure import write_statistics

    sets = options.open(images, features=features)
    options.show(sets, write_statistics(sets, out))


evaluate.command("run")(experiment.run)
evaluate.command("report")(experiment.report)

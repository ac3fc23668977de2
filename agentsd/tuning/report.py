"""The report of a tuning run: the front, the results on held-out images, samples, the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.protocol import UNPATCHED
from ..evaluation.report import LABELS, as_jpeg, data_uri, plot
from ..generation.image_files import side_by_side, write_whole

SAMPLES = 4
"""Number of held-out images on the page, the least similar ones."""


def write_report(result: dict[str, Any], folder: Path, schedule: str) -> Path:
    """Write ``report.html`` and ``front.png``.

    Args:
        result: The figures.
        folder: Folder of the tuning run, with its images.
        schedule: The schedule's YAML.

    Returns:
        The path of the page.

    Raises:
        OutputError: If a file cannot be written.
    """
    from jinja2 import Environment

    metric = next(
        name for name in ("psnr", "ssim", "lpips") if name in result["variants"][result["chosen"]]
    )
    image = plot(result, metric)
    write_whole(folder / "front.png", image)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            result=result,
            metric=metric,
            label=LABELS[metric],
            rows=sorted(result["variants"].items(), key=lambda item: item[1]["time"]["mean"]),
            plot=data_uri(image, "png"),
            samples=[as_jpeg(image, quality=90) for image in samples(result, folder, metric)],
            schedule=schedule,
        )
    )
    write_whole(folder / "report.html", html.encode())
    return folder / "report.html"


def samples(result: dict[str, Any], folder: Path, metric: str) -> list[Image.Image]:
    """The held-out images least similar to the unpatched ones, side by side with them."""
    chosen = result["chosen"]
    if chosen not in result["held_out"]:
        return []
    names = [name for name in result["held_out"] if name != "warning"]
    values = {name: result["held_out"][name]["values"] for name in names}
    similarity = values[chosen][metric]
    numbers = sorted(range(len(similarity)), key=similarity.__getitem__, reverse=metric == "lpips")
    rows = []
    for number in numbers[:SAMPLES]:
        panels = {UNPATCHED: _image(folder, number, UNPATCHED)}
        for name in names:
            label = f"{name}, {values[name][metric][number]:.4g}"
            label += f", {1 / values[name]['time'][number]:.2f}x"
            panels[label] = _image(folder, number, name)
        rows.append(side_by_side(panels))
    return rows


def _image(folder: Path, number: int, name: str) -> Image.Image:
    return Image.open(folder / f"held-out-{number}-{name}.png").convert("RGB")

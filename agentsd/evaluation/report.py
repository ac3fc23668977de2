"""Write the report of an experiment: one self-contained HTML file, its plots and its table."""

from __future__ import annotations

import base64
import json
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import EvaluationError, MissingPackageError
from ..generation.image_files import write_whole
from .pairs import contact_sheet
from .protocol import UNPATCHED
from .summary import SIMILARITIES

LABELS = {
    "time": "time, %",
    "psnr": "PSNR to unpatched, dB",
    "ssim": "SSIM to unpatched",
    "lpips": "LPIPS to unpatched",
    "cosine": "CLIP cosine similarity to unpatched",
    "clip_score": "CLIP score",
    "fid": "FID to the reference",
    "kid": "KID to the reference, ×1000",
}
SCALE = {"time": 100.0, "kid": 1000.0}
THUMBNAIL = 112


def require_packages(purpose: str, *packages: str) -> None:
    """Check that packages of the extra ``evaluate`` are installed.

    Raises:
        MissingPackageError: Names the missing one.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError(package, purpose, "evaluate") from error


def load(out: Path) -> dict[str, Any]:
    """Load the ``report.json`` of an experiment.

    Raises:
        EvaluationError: If it does not exist or is broken.
    """
    file = out / "report.json"
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
    except OSError:
        raise EvaluationError(f"{file} does not exist; agentsd evaluate run writes it") from None
    except ValueError as error:
        raise EvaluationError(f"{file} is broken ({error}); run the experiment again") from None
    return report


def write(report: dict[str, Any], out: Path) -> Path:
    """Write ``report.html``, with ``table.md`` and the plots as files beside it.

    Args:
        report: What :func:`agentsd.evaluation.experiment.run` returned.
        out: The folder of the experiment, with its images.

    Returns:
        The path of ``report.html``.

    Raises:
        MissingPackageError: If jinja2 or matplotlib is not installed.
        OutputError: If a file cannot be written.
    """
    require_packages("a report", "jinja2", "matplotlib")
    from jinja2 import Environment

    table = report["variants"]
    names, metrics = _slowest_first(table), _metrics_of(table)
    plots = []
    for metric in metrics[1:]:
        data = plot(report, metric)
        write_whole(out / f"{metric}.png", data)
        plots.append(data_uri(data, "png"))
    write_whole(out / "table.md", markdown(report).encode())
    settings = {"protocol": report["protocol"], "made_with": report["made_with"]}
    settings["variants"] = {name: table[name]["spec"] for name in names}
    differences = {
        LABELS[metric]: {name: rows[name] for name in names if name in rows}
        for metric in ("psnr", "clip_score")
        if (rows := report["differences"].get(metric))
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=f"{len(table)} variants of {Path(report['protocol']['model']).name}",
            report=report,
            protocol=report["protocol"],
            prompts=len(set(report["prompts"])),
            columns=["seconds", *(LABELS[metric] for metric in metrics)],
            rows=[{"name": name, "cells": _cells(table[name], metrics)} for name in names],
            plots=plots,
            differences=differences,
            samples=as_jpeg(samples(report, out, names)),
            worst=as_jpeg(worst(report, out)),
            settings=json.dumps(settings, indent=2),
        )
    )
    write_whole(out / "report.html", html.encode())
    return out / "report.html"


def _slowest_first(table: dict[str, Any]) -> list[str]:
    return sorted(table, key=lambda name: -table[name]["time"]["mean"])


def _metrics_of(table: dict[str, Any]) -> list[str]:
    """Time, and the metrics that at least one variant has."""
    return [m for m in LABELS if m == "time" or any(m in row for row in table.values())]


def _cells(row: dict[str, Any], metrics: list[str]) -> list[dict[str, str]]:
    cells = [{"mean": f"{row['seconds']:.2f}", "ends": ""}]
    for metric in metrics:
        interval = row.get(metric)
        scale = SCALE.get(metric, 1.0)
        if interval is None:
            cells.append({"mean": "", "ends": ""})
            continue
        mean = f"{scale * interval['mean']:.4g}"
        low, high = interval["low"], interval["high"]
        if low is None:
            ends = "[?]"
        elif metric in ("fid", "kid"):
            ends = f"± {scale * (high - low) / 2:.2g}"
        else:
            ends = f"[{scale * low:.4g}, {scale * high:.4g}]"
        cells.append({"mean": mean, "ends": ends})
    return cells


def markdown(report: dict[str, Any]) -> str:
    """The table in Markdown, slowest variant first, with the Pareto front in bold."""
    table = report["variants"]
    metrics = _metrics_of(table)
    head = ["variant", "seconds", *(LABELS[metric] for metric in metrics)]
    lines = [head, ["---"] * len(head)]
    for name in _slowest_first(table):
        label = f"**{name}**" if name in report["front"] else name
        cells = _cells(table[name], metrics)
        lines.append([label, *(f"{c['mean']} {c['ends']}".strip() for c in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(report: dict[str, Any], metric: str) -> bytes:
    """Plot a metric of each variant against its time, with intervals.

    Args:
        report: The report.
        metric: A key of :data:`LABELS`; for ``psnr``, the Pareto front is also drawn.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    table = report["variants"]
    is_similarity = metric in SIMILARITIES  # not meaningful for unpatched itself
    names = [n for n in table if metric in table[n] and not (is_similarity and n == UNPATCHED)]
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name in names:
        x, y = (table[name][key] for key in ("time", metric))
        bars = [_error_bar(v, SCALE.get(key, 1)) for key, v in (("time", x), (metric, y))]
        at = 100 * x["mean"], SCALE.get(metric, 1) * y["mean"]
        colour = "tab:red" if name in report["front"] else "tab:blue"
        axes.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt="o", ms=4, lw=1, color=colour)
        axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if metric == "psnr" and report["front"]:
        front = [table[name] for name in report["front"]]
        axes.step(
            [100 * row["time"]["mean"] for row in front],
            [row["psnr"]["mean"] for row in front],
            where="post",
            color="tab:red",
            lw=1,
            alpha=0.6,
            label="Pareto front",
        )
        axes.legend(loc="best", fontsize=8)
    axes.set_xlabel("time per image, % of unpatched")
    axes.set_ylabel(LABELS[metric])
    axes.grid(alpha=0.3)
    data = BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _error_bar(interval: dict[str, Any], scale: float) -> list[list[float]] | None:
    """Lengths below and above, as matplotlib expects; ``None`` for an unknown interval."""
    if interval["low"] is None:
        return None
    return [[scale * abs(interval["mean"] - interval[end])] for end in ("low", "high")]


def _image(out: Path, name: str, number: int) -> Image.Image:
    return Image.open(out / "images" / name / "images" / f"{number:06}.png").convert("RGB")


def samples(report: dict[str, Any], out: Path, names: list[str]) -> Image.Image:
    """Thumbnails of the first images: one row per variant, one column per image."""
    count = min(8, report["images_per_variant"])
    label, side = 2 * THUMBNAIL, THUMBNAIL + 4
    sheet = Image.new("RGB", (label + count * side, len(names) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = row * side + side // 2
        draw.text((4, middle), name, fill="black", font=ImageFont.load_default(13), anchor="lm")
        for number in range(count):
            image = ImageOps.contain(_image(out, name, number), (THUMBNAIL, THUMBNAIL))
            sheet.paste(image, (label + number * side, row * side))
    return sheet


def worst(report: dict[str, Any], out: Path) -> Image.Image:
    """Each variant's image with the lowest PSNR, beside the unpatched one; lowest first."""
    lowest = [
        min((psnr, name, number) for number, psnr in enumerate(values["psnr"]))
        for name, values in report["values"].items()
        if name != UNPATCHED
    ]
    if not lowest:
        return Image.new("RGB", (1, 1), "white")
    return contact_sheet(
        [
            (
                f"unpatched, image {number}",
                _image(out, UNPATCHED, number),
                f"{name}, {psnr:.1f} dB",
                _image(out, name, number),
            )
            for psnr, name, number in sorted(lowest)
        ]
    )


def as_jpeg(image: Image.Image, quality: int = 85) -> str:
    """A data URI of an image, as JPEG."""
    data = BytesIO()
    image.save(data, "JPEG", quality=quality)
    return data_uri(data.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """A data URI of an image file of the ``kind`` ``"png"`` or ``"jpeg"``."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

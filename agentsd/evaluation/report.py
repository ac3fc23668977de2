"""Write what an experiment found: one HTML file that needs no other, its plots, its table."""

from __future__ import annotations

import base64
import json
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import EvaluationError
from ..generation.image_files import write_whole
from .likeness import sheet
from .protocol import UNPATCHED

LABELS = {
    "time": "time, %",
    "psnr": "PSNR to unpatched, dB",
    "ssim": "SSIM to unpatched",
    "cosine": "CLIP cosine to unpatched",
    "clip_score": "CLIP score",
    "fid": "FID to the reference",
    "kid": "KID to the reference, ×1000",
}
SCALE = {"time": 100.0, "kid": 1000.0}
THUMBNAIL = 112


def require() -> None:
    """Check that the packages are there that experiments need beside agentsd's own.

    Raises:
        EvaluationError: Names the one that is not.
    """
    for package in ("jinja2", "matplotlib", "torchmetrics"):
        try:
            import_module(package)
        except ImportError as error:
            raise EvaluationError(
                f"experiments need {package}: pip install torchmetrics matplotlib jinja2 ({error})"
            ) from None


def load(out: Path) -> dict[str, Any]:
    """The ``report.json`` of an experiment.

    Raises:
        EvaluationError: If there is none, or it is broken.
    """
    file = out / "report.json"
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
    except OSError:
        raise EvaluationError(f"{file} is not there; agentsd evaluate run writes it") from None
    except ValueError as error:
        raise EvaluationError(f"{file} is broken ({error}); run the experiment again") from None
    return report


def write(report: dict[str, Any], out: Path) -> Path:
    """Write ``report.html``, with ``table.md`` and the plots as files beside it.

    Args:
        report: What :func:`agentsd.evaluation.experiment.run` returned.
        out: The folder it ran in, with the images.

    Returns:
        Where ``report.html`` is.

    Raises:
        EvaluationError: As for :func:`require`.
        OutputError: If a file cannot be written.
    """
    require()
    from jinja2 import Environment

    table = report["variants"]
    names = sorted(table, key=lambda name: -table[name]["time"]["mean"])
    figures = [f for f in LABELS if f == "time" or any(f in row for row in table.values())]
    plots = []
    for figure in figures[1:]:
        data = plot(report, figure)
        write_whole(out / f"{figure}.png", data)
        plots.append(_embedded(data, "png"))
    write_whole(out / "table.md", markdown(report).encode())
    settings = {"protocol": report["protocol"], "made_with": report["made_with"]}
    settings["variants"] = {name: table[name]["spec"] for name in names}
    differences = {
        LABELS[figure]: {name: found[name] for name in names if name in found}
        for figure in ("psnr", "clip_score")
        if (found := report["differences"].get(figure))
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
            columns=["seconds", *(LABELS[figure] for figure in figures)],
            rows=[{"name": name, "cells": _cells(table[name], figures)} for name in names],
            plots=plots,
            differences=differences,
            samples=_jpeg(samples(report, out, names)),
            worst=_jpeg(worst(report, out)),
            settings=json.dumps(settings, indent=2),
        )
    )
    write_whole(out / "report.html", html.encode())
    return out / "report.html"


def _cells(row: dict[str, Any], figures: list[str]) -> list[dict[str, str]]:
    cells = [{"mean": f"{row['seconds']:.2f}", "ends": ""}]
    for figure in figures:
        found = row.get(figure)
        scale = SCALE.get(figure, 1.0)
        if found is None:
            cells.append({"mean": "", "ends": ""})
            continue
        mean = f"{scale * found['mean']:.4g}"
        known = found["low"] is not None
        ends = f"[{scale * found['low']:.4g}, {scale * found['high']:.4g}]" if known else "[?]"
        if figure in ("fid", "kid") and known:
            ends = f"± {scale * (found['high'] - found['low']) / 2:.2g}"
        cells.append({"mean": mean, "ends": ends})
    return cells


def markdown(report: dict[str, Any]) -> str:
    """The table of figures in Markdown, fastest last; those on the front in bold."""
    table = report["variants"]
    figures = [f for f in LABELS if f == "time" or any(f in row for row in table.values())]
    head = ["variant", "seconds", *(LABELS[figure] for figure in figures)]
    lines = [head, ["---"] * len(head)]
    for name in sorted(table, key=lambda name: -table[name]["time"]["mean"]):
        shown = f"**{name}**" if name in report["front"] else name
        cells = _cells(table[name], figures)
        lines.append([shown, *(f"{c['mean']} {c['ends']}".strip() for c in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(report: dict[str, Any], figure: str) -> bytes:
    """A figure of every variant against its time, with intervals, as a PNG; with PSNR the front."""
    from matplotlib.figure import Figure

    table = report["variants"]
    alike = figure in ("psnr", "ssim", "cosine")  # to itself, the unpatched is no figure
    names = [n for n in table if figure in table[n] and not (alike and n == UNPATCHED)]
    canvas = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    axes = canvas.subplots()
    for name in names:
        x, y = (table[name][key] for key in ("time", figure))
        bars = [_bar(found, SCALE.get(key, 1)) for key, found in (("time", x), (figure, y))]
        at = 100 * x["mean"], SCALE.get(figure, 1) * y["mean"]
        colour = "tab:red" if name in report["front"] else "tab:blue"
        axes.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt="o", ms=4, lw=1, color=colour)
        axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if figure == "psnr" and report["front"]:
        edge = [table[name] for name in report["front"]]
        axes.step(
            [100 * row["time"]["mean"] for row in edge],
            [row["psnr"]["mean"] for row in edge],
            where="post",
            color="tab:red",
            lw=1,
            alpha=0.6,
            label="no other is both faster and better",
        )
        axes.legend(loc="best", fontsize=8)
    axes.set_xlabel("time of an image, % of unpatched")
    axes.set_ylabel(LABELS[figure])
    axes.grid(alpha=0.3)
    data = BytesIO()
    canvas.savefig(data, format="png")
    return data.getvalue()


def _bar(found: dict[str, Any], scale: float) -> list[list[float]] | None:
    """Below and above, as matplotlib wants them; None where the ends are not known."""
    if found["low"] is None:
        return None
    return [[scale * abs(found["mean"] - found[end])] for end in ("low", "high")]


def _image(out: Path, name: str, number: int) -> Image.Image:
    return Image.open(out / "images" / name / "images" / f"{number:06}.png").convert("RGB")


def samples(report: dict[str, Any], out: Path, names: list[str]) -> Image.Image:
    """A row of thumbnails for each variant, a column for each of the first images."""
    count = min(8, report["images_per_variant"])
    label, side = 2 * THUMBNAIL, THUMBNAIL + 4
    whole = Image.new("RGB", (label + count * side, len(names) * side), "white")
    draw = ImageDraw.Draw(whole)
    for row, name in enumerate(names):
        middle = row * side + side // 2
        draw.text((4, middle), name, fill="black", font=ImageFont.load_default(13), anchor="lm")
        for number in range(count):
            image = ImageOps.contain(_image(out, name, number), (THUMBNAIL, THUMBNAIL))
            whole.paste(image, (label + number * side, row * side))
    return whole


def worst(report: dict[str, Any], out: Path) -> Image.Image:
    """Of each variant the image with the lowest PSNR beside the unpatched one, lowest on top."""
    lowest = [
        min((psnr, name, number) for number, psnr in enumerate(values["psnr"]))
        for name, values in report["values"].items()
        if name != UNPATCHED
    ]
    if not lowest:
        return Image.new("RGB", (1, 1), "white")
    return sheet(
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


def _jpeg(image: Image.Image) -> str:
    data = BytesIO()
    image.save(data, "JPEG", quality=85)
    return _embedded(data.getvalue(), "jpeg")


def _embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

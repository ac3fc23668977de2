"""Check on a graphics card what was built without one, and write one report.

    python scripts/gpu_check.py                    # half an hour, to gpu-check/report.md
    python scripts/gpu_check.py --only memory      # one part, again

Each part is tried on the CPU, at a small size, and on CUDA at real ones. Run again, it goes on with
what is not done yet. Parts that need a device which is not there are marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from agentsd import Schedule, patched
from agentsd.benchmark import timing
from agentsd.benchmark.cases import Case, build
from agentsd.benchmark.memory import PeakMemory
from agentsd.benchmark.output import machine
from agentsd.benchmark.stopwatch import Stopwatch
from agentsd.benchmark.variants import variants_of
from agentsd.patching import runtime

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cuda")
ABSENT, DONE = "no such device", "done"
FULL_TRAINING = (
    "python scripts/train_pocket.py --device cuda --hours 1 --out pocket --work .training"
)

Found = dict[str, Any]
"""What a part found: a figure or a text by its name."""


def case(device: str, *, model: str = "sd15", side: int = 64) -> Case:
    """A UNet in the precision that people use; on the CPU the pocket model, at a small size."""
    if device == "cpu":
        return Case("pocket", 32, 32)
    return Case(model, side, side, dtype="float16", device=device)


def run(command: list[str], **variables: str) -> str:
    """The output of a command, shown as it comes.

    Raises:
        RuntimeError: If it fails.
    """
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | variables
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exits with {process.returncode}: {lines[-1:]}")
    return "".join(lines)


def tests(device: str, out: Path) -> Found:
    """Determinism, precision, waits (sync-debug mode) and CUDA graphs: tests/test_devices.py."""
    report = out / f"tests-{device}.xml"
    report.unlink(missing_ok=True)
    files = ["tests/test_devices.py", "tests/test_token_grid.py", "tests/test_reproducibility.py"]
    select = "test_devices and cpu" if device == "cpu" else "cuda or gpu or every_device"
    command = [sys.executable, "-m", "pytest", "-n", "0", *files, "-k", select]
    error = None
    try:
        run([*command, f"--junitxml={report}"])
    except RuntimeError as found:
        error = found
    if not report.exists():
        raise error or RuntimeError("the tests left no report")
    cases = ElementTree.parse(report).getroot().iter("testcase")
    outcomes = {c.get("name", ""): [child.tag for child in c] for c in cases}
    failed = [name for name, tags in outcomes.items() if {"failure", "error"} & set(tags)]
    passed = [name for name, tags in outcomes.items() if not tags or tags == ["properties"]]
    return {"passed": len(passed), "failed": len(failed), **dict.fromkeys(failed, "failed")}


def launches(device: str, out: Path) -> Found:
    """Operations that a call of the UNet launches, after the first image."""
    watch = Stopwatch(build(case(device)), case(device))
    found: Found = {}
    for name, patch in variants_of(Schedule.presets(), baselines=False).items():
        with patch(watch.unet):
            watch.call(0)
            found[name] = watch.launches()
    return found


def memory(device: str, out: Path) -> Found:
    """Peak of a call above what the idle model holds, in MiB, unpatched and patched."""
    found: Found = {}
    sizes = [("sd15", 128), ("sd15", 256), ("sdxl", 256)] if device != "cpu" else [("pocket", 32)]
    for model, side in sizes:
        given = case(device, model=model, side=side)
        watch = Stopwatch(build(given), given)
        for name in ("unpatched", *Schedule.presets()):
            with patched(watch.unet, name if name != "unpatched" else Schedule(phases=[FULL])):
                if device == "cpu":
                    with PeakMemory() as peak:
                        watch.call(0)
                    found[f"{model} {side}, {name}"] = round(peak.peak / 2**20, 1)
                else:
                    watch.call(0)
                    found[f"{model} {side}, {name}"] = round(watch.peak()[0], 1)
        del watch
    return found


FULL = {"method": "full"}


def min_tokens(device: str, out: Path) -> Found:
    """From how many tokens on no preset loses time, against the number that is built in."""
    sides = (16, 24, 32) if device == "cpu" else (16, 24, 32, 40, 48, 64)
    ratios: dict[int, dict[str, float]] = {}
    variants = variants_of(["faithful", "fast", "paper"], baselines=False, min_tokens=0)
    for side in sides:
        model = "pocket" if device == "cpu" else "sd15-top"
        precision = "float32" if device == "cpu" else "float16"
        given = Case(model, side, side, dtype=precision, device=device)
        *_, rows = timing.run(given, variants, rounds=2 if device == "cpu" else 15)
        ratios[side**2] = {row.variant: round(row.ratio, 3) for row in rows[2:]}
    worst = {tokens: max(found.values()) for tokens, found in ratios.items()}
    least = min((n for n in worst if all(worst[m] <= 1 for m in worst if m >= n)), default=None)
    guess = runtime.MIN_TOKENS[device]
    found = {"measured": least or f"above {max(worst)}", "built in": guess}
    if device == "cpu":
        found["verdict"] = "too small a trial for a verdict"
    else:
        right = least is not None and least <= guess and guess <= 2 * least
        found["verdict"] = "the guess holds" if right else "the guess is wrong"
    return found | {f"{n} tokens, time of the slowest": ratio for n, ratio in worst.items()}


def graphs(device: str, out: Path) -> Found:
    """CUDA graphs (mode="reduce-overhead"): time of a call, whole and light steps."""
    found: Found = {}
    for name in ("unpatched", "faithful", "turbo"):
        given = case(device)
        unet = build(given)
        watch = Stopwatch(unet, given)
        with patched(unet, name if name != "unpatched" else Schedule(phases=[FULL])):
            unet.compile(**({"backend": "eager"} if device == "cpu" else GRAPHS))
            times = []
            for number in range(4):  # the first two compile and record
                for step in range(6):
                    begun = time.perf_counter()
                    watch.call(step)
                    times += [time.perf_counter() - begun] * (number > 1)
        found[f"{name}, ms a call"] = round(1000 * median(times), 3)
        found[f"{name}, ms of the fastest"] = round(1000 * min(times), 3)
        torch._dynamo.reset()
    return found


GRAPHS = {"mode": "reduce-overhead"}


def benchmark(device: str, out: Path) -> Found:
    """docs/benchmarks/run.sh quick: the presets on SD 1.5 and SDXL."""
    command = f"{sys.executable} -m agentsd"
    if device == "cpu":  # its commands, without running them
        command = "echo agentsd"
    text = run(["bash", "docs/benchmarks/run.sh", "quick"], OUT=str(out.resolve()), AGENTSD=command)
    last = text.strip().splitlines()[-1]
    return {"tables": f"{out.name}/*.csv" if device != "cpu" else "not written", "last line": last}


def training(device: str, out: Path) -> Found:
    """The pocket model's training, a few steps of each stage."""
    folder = out.resolve() / f"training-{device}"
    where = ["--out", str(folder / "pocket"), "--work", str(folder / "work")]
    begun = time.perf_counter()
    run([sys.executable, "scripts/train_pocket.py", "--smoke", "--device", device, *where])
    seconds = round(time.perf_counter() - begun, 1)
    return {"seconds": seconds, "for the whole training": f"`{FULL_TRAINING}`"}


PARTS: dict[str, Callable[[str, Path], Found]] = {
    part.__name__: part
    for part in (tests, launches, memory, min_tokens, graphs, benchmark, training)
}


def write(report: Found, out: Path) -> None:
    """Write report.json, and the same as report.md."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = ["# Check of a graphics card", "", report["machine"], ""]
    lines += ["| part | " + " | ".join(DEVICES) + " |", "|---" * (1 + len(DEVICES)) + "|"]
    for name in PARTS:
        states = [report["parts"].get(f"{name}, {d}", {}).get("state", "") for d in DEVICES]
        lines.append(f"| {name} | {' | '.join(states)} |")
    for name, part in PARTS.items():
        for device in DEVICES:
            result = report["parts"].get(f"{name}, {device}", {})
            if found := result.get("found"):
                lines += [
                    "",
                    f"## {name}, {device}",
                    "",
                    str(part.__doc__),
                    "",
                    "| | |",
                    "|---|---|",
                ]
                lines += [f"| {key} | {value} |" for key, value in found.items()]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Run what is not done yet; 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], help="these, again")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    saved = given.out / "report.json"
    report = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {"parts": {}}
    if report.get("machine") not in (None, machine()):
        parser.error(f"{saved} is of another machine or other versions; give another --out")
    report["machine"] = machine()
    for name in given.only or PARTS:
        for device in DEVICES:
            key = f"{name}, {device}"
            if report["parts"].get(key, {}).get("state") == DONE and not given.only:
                continue
            result: Found = {"state": ABSENT}
            if device == "cpu" or torch.cuda.is_available():
                print(f"{key} …", file=sys.stderr)
                try:
                    result = {"state": DONE, "found": PARTS[name](device, given.out)}
                except Exception as error:  # one part must not cost the others
                    result = {"state": f"failed: {str(error).splitlines()[0][:200]}"}
                if result.get("found", {}).get("failed"):
                    result["state"] = f"{result['found']['failed']} failed"
            report["parts"][key] = result
            write(report, given.out)
    print(given.out / "report.md")
    return int(any("failed" in result["state"] for result in report["parts"].values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on with the parts that are missing")

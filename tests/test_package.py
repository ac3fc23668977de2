"""What the wheel holds, which .ci/run installs and runs; and what patching imports."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import agentsd
from agentsd.schedule import PRESETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(ROOT)], check=True)
    return next(out.glob("agentsd-*.whl"))


def test_wheel_holds_the_model_the_presets_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("unet", "vae", "text_encoder", "clip"):
        weights = [n for n in names if n.startswith(f"agentsd/pocket/{part}/")]
        assert any(name.endswith(".safetensors") for name in weights), part
    for preset in PRESETS.glob("*.yaml"):
        assert f"agentsd/configs/{preset.name}" in names
    assert "agentsd/py.typed" in names
    assert [n for n in names if not n.startswith(("agentsd/", "agentsd-"))] == []
    assert wheel.stat().st_size <= 40 * 2**20
    version = wheel.name.split("-")[1]
    assert version == agentsd.__version__, "the version is stated once, in the package"


CORE = {"torch", "diffusers", "pydantic", "ruamel"}

WATCHED = """
import builtins, json, sys
sys.path.insert(0, sys.argv[1])
from tiny_models import call, tiny_unet
real, asked = builtins.__import__, set()

def watch(name, globals=None, locals=None, fromlist=(), level=0):
    if not level and (globals or {}).get("__name__", "").partition(".")[0] == "agentsd":
        asked.add(name.partition(".")[0])
    return real(name, globals, locals, fromlist, level)

for name in [name for name in sys.modules if name.partition(".")[0] == "agentsd"]:
    del sys.modules[name]
builtins.__import__ = watch
before = set(sys.modules)
"""


PATCHING = """
import agentsd
unet = agentsd.apply_patch(tiny_unet(), "paper", min_tokens=0)
call(unet)
agentsd.inspect_patch(unet)
with agentsd.patched(unet, method="keys"):
    call(unet)
agentsd.remove_patch(unet)
"""

REPORT = """
print(json.dumps([sorted(asked), sorted(set(sys.modules) - before)]))
"""


def test_patching_needs_the_core_packages_alone() -> None:
    """None of the command line's packages; what diffusers itself imports does not count."""
    code = WATCHED + PATCHING + REPORT + "import agentsd.cli" + REPORT
    command = [sys.executable, "-c", code, str(ROOT / "tests")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    ours = {*sys.stdlib_module_names, "agentsd"}
    (asked, new), (control, _) = (
        [{name.partition(".")[0] for name in names} - ours for names in json.loads(line)]
        for line in result.stdout.splitlines()
    )
    assert {"torch", "diffusers", "pydantic"} <= asked <= CORE
    assert not new & {"typer", "click", "rich", "psutil", "filelock", "accelerate", "PIL"}
    assert {"typer", "rich"} <= control, "what the command line imports is seen"

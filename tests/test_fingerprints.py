"""Other files have other fingerprints, whatever they are called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentsd import SettingsError
from agentsd.models import fingerprints
from agentsd.models.fingerprints import check_unchanged, file_sha256, fingerprint, snapshot_commit

COMMIT = "0123456789" * 4


def test_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    one = fingerprint(file)
    assert one == file_sha256(file)
    time = file.stat().st_mtime_ns
    file.write_bytes(b"two")
    os.utime(file, ns=(time + 1, time + 1))  # within the same tick of a coarse clock
    assert fingerprint(file) != one


@pytest.mark.parametrize("change", ["bytes", "name", "more", "config"])
def test_of_a_folder(tmp_path: Path, change: str) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "a.safetensors").write_bytes(b"one")
    (unet / "config.json").write_bytes(b"{}")
    before = fingerprint(tmp_path)
    (unet / "README.md").write_text("no weights")
    (unet / ".lock").write_text("")
    assert fingerprint(tmp_path) == before
    if change == "bytes":
        (unet / "a.safetensors").write_bytes(b"other")
    elif change == "name":
        (unet / "a.safetensors").rename(unet / "b.safetensors")
    elif change == "more":
        (unet / "b.safetensors").write_bytes(b"")
    else:
        (unet / "config.json").write_bytes(b"[] ")
    assert fingerprint(tmp_path) != before


def test_of_linked_folders(tmp_path: Path) -> None:
    """Parts that models share are often links; one that leads back is followed once."""
    shared, model = tmp_path / "shared", tmp_path / "model"
    shared.mkdir()
    model.mkdir()
    (shared / "a.safetensors").write_bytes(b"one")
    (model / "vae").symlink_to(shared)
    (shared / "loop").symlink_to(model)
    before = fingerprint(model)
    assert fingerprint(model) == before
    (shared / "a.safetensors").write_bytes(b"other")
    assert fingerprint(model) != before


def test_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(f"{COMMIT}\n")
    assert snapshot_commit("owner/name") == fingerprint("owner/name/models/a.bin") == COMMIT
    assert snapshot_commit("owner/name", "9" * 40) == "9" * 40
    assert snapshot_commit("owner/name", "branch") == "branch"
    assert snapshot_commit("nobody/nothing") is None
    assert fingerprint("x" * 5000) is None


def test_the_first_that_changed_is_named() -> None:
    check_unchanged({"a": "1", "b": None, "c": "3"}, {"a": "1", "b": "2", "c": None})
    with pytest.raises(SettingsError, match=r"b is not what .* \(sha256 or commit 2 then, 3 now\)"):
        check_unchanged({"a": "1", "b": "2"}, {"a": "1", "b": "3"})


def test_of_a_folder_whose_parts_are_links(tmp_path: Path) -> None:
    """Whoever keeps one VAE for several models links to it."""
    part, model = tmp_path / "part", tmp_path / "model"
    for folder in (part, model):
        folder.mkdir()
    weights = part / "a.safetensors"
    weights.write_bytes(b"one")
    (model / "unet").symlink_to(part, target_is_directory=True)
    (part / "loop").symlink_to(model, target_is_directory=True)
    before = fingerprint(model)
    weights.write_bytes(b"other")
    assert fingerprint(model) != before

"""Every text file of a user: UTF-8 or UTF-16, any line ends, and an error that names it else."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentsd import Schedule, ScheduleError
from agentsd.app.server import read_auth
from agentsd.errors import SettingsError
from agentsd.text_files import decode_text, read_text, split_lines

TEXT = "café \u2028 one\n\n\x85 two\n"
GOOD = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": TEXT.encode("utf-8-sig"),
    "utf-16 little": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "utf-16 big": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "windows": TEXT.replace("\n", "\r\n").encode(),
    "old mac": TEXT.replace("\n", "\r").encode(),
}
BAD = {
    "cp1252": TEXT.replace("\u2028", "").encode("cp1252", "replace"),
    "utf-16 without its mark": TEXT.encode("utf-16-le"),
    "utf-16 that is cut": b"\xff\xfea",
    "utf-32": b"\xff\xfe\0\0" + TEXT.encode("utf-32-le"),
    "binary": b"\x89PNG\r\n\x1a\n\0",
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_text_is_the_same_from_any_encoding(data: bytes) -> None:
    assert decode_text(data, "x", SettingsError) == TEXT
    assert split_lines(TEXT) == ["café \u2028 one", "", "\x85 two"]
    assert split_lines(TEXT) != TEXT.splitlines()


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_other_bytes_are_errors_that_name_the_file(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(data)
    with pytest.raises(SettingsError, match=r"x\.txt: must be UTF-8, or UTF-16"):
        read_text(file, SettingsError)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path, says in {"nowhere": "No such file", "": "directory", "a\0b": "not a path"}.items():
        with pytest.raises(SettingsError, match=rf"cannot be read \(.*{says}"):
            read_text(tmp_path / path, SettingsError)
    assert split_lines("") == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_schedules_and_passwords_too(tmp_path: Path, encoding: str) -> None:
    yaml, auth = tmp_path / "s.yaml", tmp_path / "auth"
    yaml.write_bytes("# é\r\nphases:\r\n- method: full\r\n".encode(encoding))
    auth.write_bytes("me:é\x85e\r\nyou:x\r\n".encode(encoding, "replace"))
    if encoding == "cp1252":
        with pytest.raises(ScheduleError, match=r"s\.yaml: must be UTF-8"):
            Schedule.load(yaml)
        with pytest.raises(SettingsError, match="auth: must be UTF-8"):
            read_auth(auth, None)
    else:
        assert Schedule.load(yaml).phases[0].method == "full"
        assert read_auth(auth, None) == [("me", "é\x85e"), ("you", "x")]

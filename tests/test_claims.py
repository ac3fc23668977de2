"""Claims: one taker each, the dead ones' freed, nothing held when it is over."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from agentsd.errors import OutputError
from agentsd.generation.batch.claims import Claims


def test_a_piece_of_work_has_one_taker(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 60) as one, Claims(tmp_path / "c", 60) as other:
        assert one.take("0")
        assert not one.take("0")
        assert not other.take("0")
        assert other.take("1")


def test_of_many_at_once_one_takes(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 60) as claims:
        taken: list[int] = []

        def take_all() -> None:
            taken.extend(i for i in range(200) if claims.take(str(i)))

        threads = [threading.Thread(target=take_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == list(range(200))


def test_the_work_of_the_silent_is_free(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 60) as silent, Claims(tmp_path / "c", 60) as other:
        assert silent.take("0")
        long_ago = time.time() - 61
        (alive,) = [p for p in (tmp_path / "c").glob("alive-*") if silent._name in p.name]
        os.utime(alive, (long_ago, long_ago))
        assert other.take("0")
        assert not silent.take("0")


def test_a_pulse_keeps_work(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 0.3) as one, Claims(tmp_path / "c", 0.3) as other:
        assert one.take("0")
        time.sleep(0.8)
        assert not other.take("0")


def test_what_one_leaves_is_free_at_once(tmp_path: Path) -> None:
    with Claims(tmp_path / "c", 60) as one:
        assert one.take("0")
    with Claims(tmp_path / "c", 60) as other:
        assert other.take("0")
        shutil.rmtree(tmp_path / "c")
        assert not other.take("1")  # the run is over


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        Claims(tmp_path / "file" / "c", 60).__enter__()

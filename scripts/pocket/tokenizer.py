"""A CLIP tokenizer with a single token for each word of the captions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from .scenes import COLOURS, NUMBERS, SHAPES

MAX_LENGTH = 24
CLOSE_UP = "close-up"  # the first word of a close-up's caption
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word that a caption can hold, in a fixed order."""
    frame = "a an on background to the left right of above below in row column ring six 3 by grid"
    names = [*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *NUMBERS.values(), "mirrored"]
    return sorted({*frame.split(), *names})


def _byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE: printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def _apply(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge first, until none fits."""
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: merges.get(pair, len(merges)))
        if best not in merges:
            break
        at = pairs.index(best)
        pieces = [*pieces[:at], best[0] + best[1], *pieces[at + 2 :]]
    return pieces


def merges_for(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Find merges under which every word of the vocabulary becomes one token.

    Each word is encoded with the merges so far and the missing ones are appended. A merge made for
    one word can spoil another, so the pass repeats until nothing is missing.
    """
    merges: dict[tuple[str, str], int] = {}
    missing = True
    while missing:
        missing = False
        for word in vocabulary:
            pieces = _apply([*word[:-1], word[-1] + "</w>"], merges)
            while len(pieces) > 1:
                missing = True
                merges.setdefault((pieces[0], pieces[1]), len(merges))
                pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt` into a folder and load them as a tokenizer."""
    merges = merges_for(words())
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.add_tokens(CLOSE_UP)  # the last one, so that earlier text encoders keep their ids
    tokenizer.save_pretrained(folder)
    return tokenizer

"""MinHash signatures of texts, and which of them are likely alike (locality-sensitive hashing).

Texts are compared by their sets of character shingles, in one case and without marks: a typo or another word changes a
few of them, in every language. Signatures are datasketch's (Broder, 1997); they lie in a file, 4 bytes a permutation.
Banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3) is done on sorted arrays: one of N band
keys at a time, so that memory is a few numbers a text and cost grows as N log N, however many texts are alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

# What tells texts apart beside letters and digits: the signs of vowels in Indic scripts, Thai or Arabic, which Python's
# \w leaves out; operators, arrows and emoji, which may be all of an answer.
_SIGNS = "".join(
    chr(code)
    for code in (*range(0x0300, 0x1E00), *range(0xA660, 0xAC00))
    if unicodedata.category(chr(code)).startswith("M")
)
_SYMBOLS = "+<>=\u2190-\u22ff\u2600-\u27bf\U0001f000-\U0001faff"
_NO_WORD = re.compile(f"(?:[^\\w{_SIGNS}{_SYMBOLS}]|_)+")
_FACTOR = np.uint32(0x01000193)
# Neighbours in a bucket that a text is compared with; the lowest one always is. Bounds what a huge bucket costs.
_WINDOW = 12
_ORDERED_BY = 3  # bands: the bucket's own, and those by which the rows in it are ordered
_CHUNK = 20_000
# The probability that a pair at the threshold is looked at. What is joined into groups has many a pair.
_FOUND, _SURELY = 0.97, 0.9999
# A signature's estimate strays by about sqrt(s (1 - s) / permutations), 0.035 at 0.8 and 128. What it puts this far
# below a threshold is not looked at.
_MARGIN = 0.12

Pairs = NDArray[np.int64]


def plain(text: str) -> str:
    """The text in one case, with single spaces, without marks such as . , ! ( or *."""
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def shingles(text: str, length: int) -> NDArray[np.uint32]:
    """Sorted hashes (S,) of the runs of `length` characters in `plain(text)`; of the whole where it is shorter."""
    codes = np.frombuffer(plain(text).encode("utf-32-le"), dtype=np.uint32)
    length = min(length, max(len(codes), 1))
    hashes = np.zeros(max(len(codes) - length + 1, 1), dtype=np.uint32)
    for offset in range(min(length, len(codes))):
        hashes = hashes * _FACTOR + codes[offset : offset + len(hashes)]
    return np.unique(hashes)


def jaccard(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """The share of both sets' shingles that they have in common."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def write_signatures(sets: Iterable[NDArray[np.uint32]], file: Path, permutations: int) -> NDArray[np.uint32]:
    """The signatures (N, permutations) of `sets`, written to `file` and mapped from there."""
    empty = MinHash(num_perm=permutations, hashfunc=_itself)
    with file.open("wb") as stream:
        for one in sets:
            sketch = empty.copy()
            sketch.update_batch(one.tolist())
            stream.write(sketch.hashvalues.astype("<u4").tobytes())
    if file.stat().st_size == 0:
        return np.empty((0, permutations), dtype=np.uint32)
    return np.memmap(file, dtype="<u4", mode="r").reshape(-1, permutations)


def alike(signatures: NDArray[np.uint32], threshold: float) -> Pairs:
    """Pairs (P, 2) of rows i < j whose signatures are likely at least `threshold` alike, sorted by j, then i."""
    rows = np.arange(len(signatures))
    return _sorted([likely(signatures, pairs, threshold) for pairs in by_band(signatures, threshold, rows, _SURELY)])


def by_band(
    signatures: NDArray[np.uint32], threshold: float, rows: NDArray[np.int64], found: float = _FOUND
) -> Iterator[Pairs]:
    """Pairs (P, 2) of rows i < j among `rows` that share a band's values, a band at a time; most are not alike."""
    bands, width = _bands(threshold, signatures.shape[1], found)
    for band in range(bands):
        keys = [_keys(signatures, (band + further) % bands, width)[rows] for further in range(_ORDERED_BY)]
        yield rows[_neighbours(keys)]


def likely(signatures: NDArray[np.uint32], pairs: Pairs, threshold: float, other: Any = None) -> Pairs:
    """Those of `pairs`, each once, whose whole signatures agree well enough; the second row is one of `other`."""
    other = signatures if other is None else other
    kept = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(pairs), _CHUNK):
        chunk = np.unique(pairs[start : start + _CHUNK], axis=0)
        agreement = (signatures[chunk[:, 0]] == other[chunk[:, 1]]).mean(axis=1)
        kept.append(chunk[agreement >= threshold - _MARGIN])
    return np.concatenate(kept)


def alike_across(one: NDArray[np.uint32], other: NDArray[np.uint32], threshold: float) -> Pairs:
    """Pairs (P, 2) of a row of `one` and a row of `other` that are likely at least `threshold` alike."""
    bands, width = _bands(threshold, one.shape[1], _SURELY)
    both = [_matches(_keys(one, band, width), _keys(other, band, width)) for band in range(bands)]
    return _sorted([likely(one, pairs, threshold, other) for pairs in both])


def _itself(value: int) -> int:
    return value


def _bands(threshold: float, permutations: int, found: float) -> tuple[int, int]:
    """Bands and rows a band: as many rows as find a pair at the threshold with at least the probability `found`.

    A pair of similarity s shares a band of r rows with the probability s^r, and one of b bands with 1 - (1 - s^r)^b.
    """
    rows = 1
    while 1 - (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1)) >= found and rows < permutations:
        rows += 1
    return permutations // rows, rows


def _keys(signatures: NDArray[np.uint32], band: int, rows: int) -> NDArray[np.uint64]:
    """One key (N,) a text: its values of the band, mixed (FNV-1a)."""
    keys = np.full(len(signatures), 0xCBF29CE484222325, dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        keys = (keys ^ signatures[:, column].astype(np.uint64)) * np.uint64(0x100000001B3)
        keys ^= keys >> np.uint64(29)
    return keys


def _neighbours(keys: list[NDArray[np.uint64]]) -> Pairs:
    """Pairs i < j of rows with one `keys[0]`: each with its bucket's lowest, and with those that stand next to it.

    Within a bucket rows stand by the keys that follow: in a large one, those that are most alike are neighbours.
    """
    order = np.lexsort(keys[::-1])
    ordered = keys[0][order]
    pairs = [np.empty((0, 2), dtype=np.int64)]
    if len(order):
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        sizes = np.diff(np.append(starts, len(order)))
        lowest = np.repeat(np.minimum.reduceat(order, starts), sizes)
        others = lowest != order
        pairs.append(np.stack([lowest[others], order[others]], axis=1))
    for distance in range(1, min(_WINDOW, len(order) - 1) + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            break
        pairs.append(np.stack([order[same], order[same + distance]], axis=1))
    found: Pairs = np.sort(np.concatenate(pairs), axis=1)
    return found


def _matches(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> Pairs:
    """Pairs of a row of `keys` and a row of `others` with one key; at most _WINDOW a row."""
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    left, right = np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for distance in range(_WINDOW):
        rows = np.flatnonzero(left + distance < right)
        if not len(rows):
            break
        pairs.append(np.stack([rows, order[left[rows] + distance]], axis=1))
    found: Pairs = np.concatenate(pairs).astype(np.int64, copy=False)
    return found


def _sorted(found: list[Pairs]) -> Pairs:
    pairs = np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *found]), axis=0)
    ordered: Pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    return ordered

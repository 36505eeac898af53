"""What a file calls its bands, held against the bands that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_COLOURS: Final = frozenset({"red", "green", "blue", "nir"})
_WORDS: Final = _COLOURS | {
    "coastal", "cyan", "yellow", "orange", "rededge", "pan", "swir", "mwir", "lwir", "tir",
}  # fmt: skip


def band_names(dataset: Any, bands: Sequence[int]) -> tuple[str, ...]:
    """The colour that the file gives each of ``bands`` (from 1): red, nir, swir, ...; "" where it gives none.

    A description that is such a word counts before the colour interpretation: GDAL calls the bands of any
    GeoTIFF of three bytes red, green, blue.
    """
    try:
        descriptions = dataset.descriptions
    except UnicodeError:  # they are in no known encoding, and the pixels need none
        descriptions = (None,) * dataset.count
    meanings = dataset.colorinterp
    return tuple(_colour(descriptions[number - 1]) or _colour(meanings[number - 1].name) for number in bands)


def contradict(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether bands called ``names`` are surely not the model's ``wanted``, each in its place.

    They are where all that is wanted are colours, and ``names`` are the same in another order, or one of them
    is red, green, blue or nir in the place of another colour.
    """
    asked = [_colour(name) for name in wanted]
    if not all(asked) or len(names) != len(asked):
        return False
    reordered = list(names) != asked and sorted(names) == sorted(asked)
    return reordered or any(
        name in _COLOURS and name != colour for name, colour in zip(names, asked, strict=True)
    )


def _colour(text: str | None) -> str:
    word = (text or "").strip().lower()
    return word if word in _WORDS else ""

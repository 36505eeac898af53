"""The header of a model file, read without torch: the card and the layout of the weights.

A safetensors file is a little-endian uint64 n, n bytes of JSON, then the raw tensors. The JSON holds dtype,
shape and ``data_offsets`` of each tensor and, under ``__metadata__``, text by name; ours are ``segpipe`` (the
card as JSON) and ``segpipe.format``. Nothing here or in ``file`` unpickles.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pydantic import ValidationError

from segpipe.config.card import ModelCard
from segpipe.errors import InputError

FORMAT: Final = 1
CARD_KEY: Final = "segpipe"
FORMAT_KEY: Final = "segpipe.format"
MAX_HEADER_BYTES: Final = 16 * 2**20
"""Far above any real header (some 100 bytes a tensor); a guard against damaged or hostile lengths."""
LENGTH_BYTES: Final = 8

_CONVERT: Final = (
    "Give a .safetensors file written by segpipe; foreign checkpoints are not loaded by predict."
)
_FETCH: Final = "Fetch or write the file again."

_FOREIGN: Final = (
    (b"PK\x03\x04", "a zip file, as torch.save writes it (.pth, .pt)"),
    (b"\x80", "a pickle file (.pth, .pkl)"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself"),
)


def read_card_bytes(data: bytes, where: str = "model file") -> ModelCard:
    """The card of a whole model file in memory; does not import torch. ``where`` names the file in errors.

    Raises:
        InputError: not a model file of segpipe, or a damaged one.
    """
    metadata = parse_header(data, where).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(CARD_KEY), str):
        raise InputError("a safetensors file without segpipe's model card", where, _CONVERT)
    written = metadata.get(FORMAT_KEY, "")
    if not (isinstance(written, str) and re.fullmatch("[0-9]{1,6}", written)):
        raise InputError(f"the model file's format is {written!r}, not a number", where, _FETCH)
    if int(written) > FORMAT:
        raise InputError(
            f"the model file has format {written}, newer than {FORMAT}", where, "Update segpipe."
        )
    try:
        return ModelCard.model_validate_json(metadata[CARD_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"the model card is not valid: {place + ': ' if place else ''}{first['msg']}"
        raise InputError(what, where, "Write the model file again.") from error


def parse_header(data: bytes, where: str) -> dict[str, Any]:
    """The header's JSON object, once lengths and offsets fit the file's size.

    Raises:
        InputError: foreign content, a cut file, or a header that is no JSON object.
    """
    for magic, what in _FOREIGN:
        # A safetensors header may be 128 bytes long (0x80), yet its ninth byte is always a brace.
        if data.startswith(magic) and data[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise InputError(f"the model is {what}, not safetensors", where, _CONVERT)
    if len(data) < LENGTH_BYTES + 2:
        raise InputError(f"the model file has only {len(data)} bytes", where, _FETCH)
    length_bytes = int.from_bytes(data[:LENGTH_BYTES], "little")
    if data[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{" or length_bytes > MAX_HEADER_BYTES:
        raise InputError("the model is not a safetensors file", where, _CONVERT)
    body_start = LENGTH_BYTES + length_bytes
    if body_start > len(data):
        raise InputError("the model file is cut off within its header", where, _FETCH)
    try:
        header = json.loads(data[LENGTH_BYTES:body_start])
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise InputError("the model file's header is damaged", where, _FETCH) from error
    wanted_bytes = body_start + max(ends, default=0)
    if wanted_bytes != len(data):
        state = "is cut off" if len(data) < wanted_bytes else "has extra bytes"
        raise InputError(f"the model file {state}: {len(data)} of {wanted_bytes} bytes", where, _FETCH)
    return dict(header)

"""Archives of small files, and what the catalogue makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from segpipe.config.model import InputConfig
from segpipe.errors import InputError
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneSource
from segpipe.storage import open_storage


def put(root: str, *keys: str, data: bytes = b"x") -> None:
    storage = open_storage(root)
    for key in keys:
        storage.put(key, data)


def scenes(
    *inputs: str, output: str | None = None, need_labels: bool = False, **config: Any
) -> list[SceneSource]:
    with list_scenes(InputConfig(scenes=inputs, **config), output, need_labels=need_labels) as found:
        return [source for page in found.pages() for source, _ in page]


def ids(*inputs: str, **options: Any) -> list[str]:
    return [source.scene_id for source in scenes(*inputs, **options)]


def fault(*inputs: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        scenes(*inputs, **options)
    return str(caught.value)

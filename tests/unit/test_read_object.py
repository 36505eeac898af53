"""Objects that are read whole: in the version that was listed, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from segpipe.datasets.images import read_encoded
from segpipe.errors import SceneError
from segpipe.rasters.driver import read_object
from segpipe.rasters.scene import SceneSource, Version
from segpipe.rasters.vectors import read_areas
from segpipe.storage import open_object


def version_of(path: Path) -> Version:
    storage, key = open_object(str(path))
    info = storage.stat(key)
    assert info is not None
    return Version(info.size_bytes, info.etag)


def test_an_object_is_read_in_the_version_that_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_bytes(b"0123456789")
    version = version_of(path)
    assert read_object(str(path), version) == b"0123456789"
    path.write_bytes(b"0123456789 and more")
    with pytest.raises(SceneError, match="another version") as caught:
        read_object(str(path), version)
    assert (caught.value.kind, caught.value.where) == ("scene_changed", str(path))
    path.unlink()
    with pytest.raises(SceneError, match="gone") as caught:
        read_object(str(path), version)
    assert (caught.value.kind, caught.value.where) == ("not_found", str(path))


def test_the_kind_says_whether_image_or_label_is_gone(tmp_path: Path) -> None:
    path, version = tmp_path / "a.geojson", Version(10, "1")
    with pytest.raises(SceneError) as caught:
        read_encoded(SceneSource("a", str(path), version))
    assert caught.value.kind == "not_found"
    with pytest.raises(SceneError) as caught:
        read_areas(str(path), version, "EPSG:32633")
    assert caught.value.kind == "label_read"
    path.write_bytes(b"{}")
    with pytest.raises(SceneError) as caught:
        read_areas(str(path), version, "EPSG:32633")
    assert caught.value.kind == "scene_changed"

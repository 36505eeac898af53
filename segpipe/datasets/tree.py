"""All objects below a root, by key: what the fixed layouts look their files up in."""

from __future__ import annotations

from dataclasses import dataclass

from segpipe.errors import InputError, ObjectMissing, StorageRefused
from segpipe.rasters.scene import SceneSource, Version
from segpipe.storage import ObjectInfo, join_uri, open_storage


@dataclass(frozen=True, slots=True)
class Tree:
    """One listing of a folder or prefix."""

    root: str
    objects: dict[str, ObjectInfo]

    def version(self, key: str) -> Version:
        info = self.objects[key]
        return Version(info.size_bytes, info.etag)

    def read_text(self, key: str) -> str:
        """A small text file as UTF-8. Raises `InputError`."""
        try:
            return open_storage(self.root).read(key).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError("it is not UTF-8 text", join_uri(self.root, key), "Correct the file.") from error
        except (ObjectMissing, StorageRefused) as error:
            raise InputError(error.what, error.where, "Correct the path.") from error

    def pair(self, scene_id: str, image: str, label: str | None) -> SceneSource:
        """Image and label of one sample, pinned to the listed versions."""
        return SceneSource(
            scene_id,
            join_uri(self.root, image),
            self.version(image),
            join_uri(self.root, label) if label else None,
            self.version(label) if label else None,
        )


def list_tree(uri: str) -> Tree:
    """List all objects below ``uri``. Raises `InputError` where there are none."""
    storage = open_storage(uri)
    objects = {info.key: info for page in storage.list() for info in page}
    if not objects:
        raise InputError("nothing is there", uri, "Name the folder that holds the data set.")
    return Tree(storage.root, objects)

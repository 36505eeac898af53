"""Images and masks by pattern: any folder, glob, list, catalogue or shards, with labels by template."""

from __future__ import annotations

from collections.abc import Iterator

from segpipe.config.model import InputConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets.images import read_pair
from segpipe.datasets.layout import ReadsAlone, Sample, SampleRef, refuse_missing
from segpipe.datasets.splits import split_of
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.scene import SceneSource


class FolderLayout(ReadsAlone):
    """Labels hold ids or colours, palette and RGB mixed. Splits by globs or by a hash of the id."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.classes = config.classes
        self._label_map = dict(config.label_map)

    def listing(self) -> Iterator[SampleRef]:
        """Samples sorted by scene id, which is also the sample's id."""
        for scene in labelled_scenes(self._config):
            split = split_of(scene.scene_id, scene.scene_id, self._config.split)
            size_bytes = scene.length or scene.version.size_bytes
            if scene.member is not None and scene.length is None:
                size_bytes //= max(1, scene.shard_members or 1)
            yield SampleRef(scene.scene_id, split, scene, size_bytes)

    def read(self, ref: SampleRef) -> Sample:
        """Values or colours become classes by ``label_map``, else by the classes themselves."""
        return read_pair(ref, self.classes, self._label_map, self._config.limits)


def labelled_scenes(config: PrepareConfig) -> Iterator[SceneSource]:
    """The scenes of the config with their labels. Raises `InputError` for those without."""
    wanted = InputConfig(scenes=config.sources, labels=config.labels, limits=config.limits)
    unlabelled = []
    with list_scenes(wanted, config.output, need_labels=True) as scenes:
        for page in scenes.pages():
            for scene, _ in page:
                if scene.label_uri is None:
                    unlabelled.append(scene.where)
                else:
                    yield scene
    refuse_missing(unlabelled, "label", ", ".join(config.sources))

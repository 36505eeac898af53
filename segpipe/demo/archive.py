"""Where the demo's scenes, labels and model lie."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DemoArchive:
    """Local paths of the packaged files."""

    scenes: Path
    """Folder of georeferenced GeoTIFF scenes."""
    labels: Path
    """Folder of the label rasters, named as their scenes."""
    model: Path
    attribution: Path


def demo_archive() -> DemoArchive:
    """Return the packaged archive."""
    data = Path(str(resources.files("segpipe.demo") / "data"))
    return DemoArchive(
        scenes=data / "scenes",
        labels=data / "labels",
        model=data / "model.safetensors",
        attribution=data / "ATTRIBUTION.md",
    )

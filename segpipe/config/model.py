"""The config of predict and evaluate as pydantic models: a YAML file, flags and ``--set`` fill one tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all configs: unknown keys, infinite numbers and NaN are refused, values are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # JSON, which run files and recipes are, has neither
    )


class LimitsConfig(Section):
    """Caps that a file's header is held against before any pixel is decoded."""

    scene_px: float = Field(default=2.0e10, gt=0)
    """Most pixels of one scene (rows x columns)."""
    file_block_bytes: int = Field(default=268_435_456, gt=0)
    """Most bytes of one decoded tile or strip of a file."""


class InputConfig(Section):
    """What to read, and how pixels become valid or no data."""

    scenes: tuple[str, ...] = ()
    """Paths, globs, prefixes, list files (.txt) or catalogues (.csv, .parquet with a `uri` column)."""
    include: tuple[str, ...] = ()
    """Keep only scenes whose id matches one of these globs."""
    exclude: tuple[str, ...] = ()
    """Leave out scenes whose id matches one of these globs."""
    labels: str | None = None
    """Template of the label's path: {stem}, {parent} and {scene_id} are filled in per scene."""
    label_map: dict[str, int] = {}
    """Label value ("7") or colour ("#rrggbb") to class index; 255 = ignore. Empty: values are indices."""
    bands: Auto | tuple[PositiveInt, ...] = "auto"
    """Band numbers (from 1) in the model's order; auto = the first that are not alpha."""
    valid: str = "auto"
    """Where pixels are data: auto, none, nodata, alpha, or the template of a mask sidecar."""
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _check(self) -> InputConfig:
        if self.valid not in ("auto", "none", "nodata", "alpha") and "{" not in self.valid:
            raise ValueError(
                "valid: must be auto, none, nodata, alpha or a template such as {parent}/{stem}_mask.tif"
            )
        if any(not 0 <= index <= 255 for index in self.label_map.values()):
            raise ValueError("label_map: class indices lie between 0 and 255 (255 = ignore)")
        return self


class InferenceConfig(Section):
    """How pixels become classes: this whole section stands in the recipe key."""

    tile_px: Auto | Annotated[int, Field(ge=32, le=8192)] = "auto"
    """Side of the square that the model sees at once; auto = the model card's."""
    margin_px: Annotated[int, Field(ge=0)] = 32
    """Context inside a tile on each side of the kept cell; at most a quarter of the tile."""
    block_px: Annotated[int, Field(ge=1)] = 4096
    """Side of a block, one row of the mask dataset, in scene pixels."""
    unit_px: Auto | PositiveInt = "auto"
    """Pixels of a unit (one object); auto = 16 Mpx on CPU, 1 Gpx on GPU."""
    downsample: Auto | Annotated[int, Field(ge=1, le=16)] = "auto"
    """Whole number by which scenes are reduced; auto = model pixel size / scene pixel size."""
    blend: Literal["crop", "linear"] = "crop"
    """crop keeps each tile's cell; linear averages all tiles that cover a pixel."""
    batch_size: Auto | PositiveInt = "auto"
    """Tiles in a batch; auto depends on the device."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the network; auto looks at the device."""
    compile: bool = False
    """Use torch.compile: slower start, faster steady state."""


class FailuresConfig(Section):
    """How many failed scenes a run may have and still exit with 0."""

    max_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of scenes."""


class ExecutorConfig(Section):
    """Where to run."""

    executor: Literal["ray", "local"] = "ray"
    """ray, or local = in this process (debugging, notebooks)."""
    address: str | None = None
    """Address of a Ray cluster; none: RAY_ADDRESS, else Ray starts in-process on loopback."""


class ClusterConfig(ExecutorConfig):
    """Where and how widely to run."""

    workers: Auto | PositiveInt = "auto"
    """Size of the worker pool; auto = one per GPU, else one per node."""
    threads_per_worker: Auto | PositiveInt = "auto"
    """Compute threads of one worker; auto = CPUs / workers."""


class SegpipeConfig(Section):
    """One job: what to read, which model, where to write."""

    input: InputConfig = InputConfig()
    model: str | None = None
    """URI of a model.safetensors."""
    output: str | None = None
    """URI of the run folder."""
    inference: InferenceConfig = InferenceConfig()
    failures: FailuresConfig = FailuresConfig()
    cluster: ClusterConfig = ClusterConfig()

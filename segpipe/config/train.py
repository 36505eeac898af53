"""The config of ``segpipe train``: data, model, optimisation, validation, cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from segpipe.config.load import load_model_config
from segpipe.config.model import Auto, ClusterConfig, PositiveInt, Section

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class AugmentConfig(Section):
    """Changes of image and label together, drawn anew for each sample and epoch."""

    preset: Literal["street", "aerial", "none"] = "aerial"
    """street: scale, crop, mirror, colour; aerial: 8 symmetries, noise, band dropout too; none: crop only."""
    crop_px: Annotated[int, Field(ge=32, le=4096)] = 256
    """Side of the square that the network is trained on, pixels."""
    scale: tuple[Positive, Positive] | None = None
    """Least and most enlargement of the image; none: the preset's."""
    rotate: bool = False
    """Turn by any angle, not only by the 8 symmetries."""
    colour: Annotated[float, Field(ge=0, le=3)] = 1.0
    """Strength of colour, contrast and brightness changes, as a factor of the preset's; 0 = none."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of added noise at most, as a fraction of a band's own; none: the preset's."""
    band_dropout: Share | None = None
    """Chance that one band is replaced by its mean; none: the preset's."""

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.scale is not None and self.scale[0] > self.scale[1]:
            raise ValueError("scale: the least comes first")
        return self


class DataConfig(Section):
    """Which prepared data set, and how its samples become batches."""

    uri: str = Field(min_length=1)
    """URI of the folder that ``segpipe prepare`` wrote (the one that holds dataset.json)."""
    train_splits: tuple[SplitName, ...] = Field(default=("train",), min_length=1)
    """Splits that are trained on."""
    val_splits: tuple[SplitName, ...] = ("val",)
    """Splits that validation scores; empty, or none of them there: no validation."""
    augment: AugmentConfig = AugmentConfig()
    prefetch_batches: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that are read, decoded and augmented ahead of the step."""
    loader_threads: Auto | PositiveInt = "auto"
    """Threads a worker that read, decode and augment; auto = as many as compute threads, at least 2."""


class NetworkConfig(Section):
    """Which network; bands and classes come from the data set."""

    family: str = "unet"
    """Key of the model families: unet, unet_mobilenet_v2, pixel, lraspp_mobilenet_v3_large, ..."""
    options: dict[str, Any] = {}
    """Options of the family, such as {width: 16}."""
    tile_px: Annotated[int, Field(ge=32, le=8192)] = 512
    """Tile that validation and later predictions use; stands in the model card."""
    bands: tuple[str, ...] = ()
    """Band names in order; empty: red, green, blue for three, else band_1, ..."""


class InitConfig(Section):
    """Where the weights start."""

    weights: str | None = None
    """Local, http(s) or s3 URI of pretrained weights: our model.safetensors or a torchvision state dict."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """What the file's SHA-256 must be."""


class LossConfig(Section):
    """A weighted sum of losses over the valid pixels."""

    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    dice: Annotated[float, Field(ge=0)] = 0.0
    focal: Annotated[float, Field(ge=0)] = 0.0
    lovasz: Annotated[float, Field(ge=0)] = 0.0
    """Weight of each loss in the sum; at least one is above 0."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "inverse", "median_frequency"] = "none"
    """Weights of cross-entropy and focal loss, from the class pixels of the training splits."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not (self.cross_entropy or self.dice or self.focal or self.lovasz):
            raise ValueError("cross_entropy: one of cross_entropy, dice, focal and lovasz must be above 0")
        return self


class OptimizerConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    """Highest learning rate."""
    encoder_lr_factor: Positive = 1.0
    """Learning rate of weights that came from ``init.weights``, as a factor of ``lr``."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of convolution weights; biases and norms have none."""
    momentum: Share = 0.9
    """sgd only."""
    schedule: Literal["poly", "cosine", "one_cycle", "constant"] = "cosine"
    poly_power: Positive = 0.9
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    clip_norm: Positive | None = None
    """Largest norm of all gradients together; none: not clipped."""


class TrainSection(Section):
    """How long, how much at once, and with which arithmetic."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    global_batch: PositiveInt = 8
    """Samples of one step over all workers."""
    micro_batch: Auto | PositiveInt = "auto"
    """Most samples that a worker computes at once (gradients add up); auto = its whole share."""
    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    """How long: epochs, or optimiser steps; give one."""
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: Share | None = None
    """Keep an average of the weights and validate, save and ship that; none: no average."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Autocast type; auto looks at the device."""
    compile: bool = False
    """Use torch.compile."""
    sync_batch_norm: bool = False
    """Batch norm over all workers; GPU only."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How weights lie on the workers; fsdp2 needs GPUs."""
    log_order: bool = False
    """Write order/*.parquet: which sample each lane saw at each step."""

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("steps: give epochs or steps, one of them")
        return self


class ValidationConfig(Section):
    """When to score, and what the best checkpoint is."""

    metric: str = "miou"
    """miou, mdice, accuracy, or iou:CLASS, dice:CLASS; higher is better."""
    every: Auto | PositiveInt = "auto"
    """Epochs (train.epochs) or steps (train.steps) between two; auto = 1 epoch or a tenth of all."""
    patience: PositiveInt | None = None
    """Stop after as many validations without a better score; none: go on to the end."""
    final: Literal["best", "last"] = "best"
    """Which weights become model.safetensors."""


class CheckpointConfig(Section):
    """What is kept to go on from."""

    every_steps: Auto | PositiveInt = "auto"
    """Steps between checkpoints; auto = at each validation."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept, besides the best."""


class LoggingConfig(Section):
    """Copies of the history for other tools."""

    tensorboard: bool = False
    """Write TensorBoard events to OUTPUT/tensorboard."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server or folder; needs the extra segpipe[mlflow]."""


class TrainConfig(Section):
    """One ``segpipe train``."""

    data: DataConfig
    model: NetworkConfig = NetworkConfig()
    init: InitConfig = InitConfig()
    train: TrainSection
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: str | None = None
    """URI of the folder for checkpoints, history and model.safetensors."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a lost worker may be replaced before the run ends (resumable)."""


def load_train(
    text: str | None, overrides: Mapping[str, Any], sets: Sequence[str], where: str
) -> TrainConfig:
    """The config of a YAML ``text``, then ``overrides`` (dotted key -> value), then ``sets`` ("a.b=c").

    Raises `ConfigError` that lists every fault: unknown keys with the nearest valid one, bad values.
    """
    return load_model_config(TrainConfig, text, overrides, sets, where, "See docs/train.md for all keys.")

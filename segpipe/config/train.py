"""The config of ``segpipe train``: data, network, start, steps, validation, checkpoints, cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from segpipe.config.load import load_model_config
from segpipe.config.model import Auto, ExecutorConfig, PositiveInt, Section
from segpipe.config.prepare import SplitName

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
VALIDATION_METRICS: Final = ("miou", "mdice", "accuracy", "mean_accuracy", "fw_iou", "kappa")


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
    augment: AugmentConfig = AugmentConfig()
    prefetch_batches: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that are read, decoded and augmented ahead of the step."""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Decoded samples that each worker keeps in memory, bytes: for small data sets of large images."""


class NetworkConfig(Section):
    """Which network is trained."""

    family: str = "unet"
    """Key of the model families: unet, unet_mobilenet_v2, fcn_resnet50, deeplabv3_resnet50, ..."""
    options: dict[str, Any] = {}
    """Options of the family, such as {width: 16}."""
    bands: tuple[str, ...] = ()
    """Names of the bands; empty: red, green, blue for three bands, else band_1, band_2, ..."""
    normalise: Literal["dataset", "imagenet"] = "dataset"
    """Mean and spread that pixels are normalised by: the data set's, or ImageNet's (8-bit RGB only)."""


class InitConfig(Section):
    """What the network starts from."""

    weights: str | None = None
    """URI (local, http or s3://) of a model file of segpipe or of torchvision weights; none: random start."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """Digest that the file must have, in hex: all of it, or its first 8 digits at least."""


class LossConfig(Section):
    """A weighted sum of losses; a weight of 0 leaves one out."""

    cross_entropy: Annotated[float, Field(ge=0)] = 1.0
    dice: Annotated[float, Field(ge=0)] = 0.0
    """1 - mean Dice over the classes, of the sums over all workers' pixels."""
    focal: Annotated[float, Field(ge=0)] = 0.0
    lovasz: Annotated[float, Field(ge=0)] = 0.0
    """Lovasz-softmax of each image, averaged over images."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    label_smoothing: Share = 0.0
    """Part of each pixel's weight that is spread over all classes; cross-entropy only."""
    class_weights: Literal["none", "inverse", "median_frequency"] = "none"
    """Weights of the classes in cross-entropy and focal loss, from their pixels in the training splits."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if not any((self.cross_entropy, self.dice, self.focal, self.lovasz)):
            raise ValueError("cross_entropy: at least one loss needs a weight above 0")
        return self


class StepsConfig(Section):
    """How the network is trained."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Enters the order of samples, augmentation, dropout and the random start."""
    global_batch: PositiveInt = 8
    """Samples of one optimiser step, over all workers."""
    micro_batch: PositiveInt | None = None
    """Most samples of one forward pass of a worker; none: all of its share at once."""
    epochs: PositiveInt | None = None
    """Length of the training in passes over the data; or give ``steps``."""
    steps: PositiveInt | None = None
    """Length of the training in optimiser steps."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    """Highest learning rate."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate of a pretrained backbone's parameters."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Not applied to biases and norms."""
    momentum: Share = 0.9
    """Of SGD."""
    schedule: Literal["constant", "poly", "cosine", "one_cycle"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises linearly to ``lr``; of one_cycle the rising part (0: 30 % of all)."""
    poly_power: Positive = 0.9
    clip_norm: Positive | None = 1.0
    """Largest norm of all gradients together; none: not clipped."""
    ema_decay: Share = 0.0
    """Decay a step of the running average of the weights that is validated and kept; 0: no average."""
    batch_norm: Literal["train", "sync", "frozen"] = "train"
    """train: statistics of each worker's batch; sync: of all workers' (GPUs); frozen: those of the start."""
    loss: LossConfig = LossConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto: fp32 on CPUs, bf16 on GPUs that compute in it, else fp16."""
    compile: bool = False
    """Use torch.compile: slower start, faster steps on GPUs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: whole copies of the network; fsdp: sharded parameters and optimiser state (GPUs)."""
    log_order: bool = False
    """Write which sample each lane saw at each step."""

    @model_validator(mode="after")
    def _check(self) -> StepsConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs: give epochs or steps, one of them")
        return self


class ValidationConfig(Section):
    """When and how the network is scored on whole images."""

    splits: tuple[SplitName, ...] = ("val",)
    """Splits that are scored, each image once; empty: no validation, the last weights are kept."""
    metric: str = "miou"
    """What chooses the best weights: miou, mdice, accuracy, mean_accuracy, fw_iou, kappa, or iou:CLASS."""
    every_epochs: PositiveInt = 1
    """Epochs between two validations, unless ``every_steps`` is given."""
    every_steps: PositiveInt | None = None
    """Steps between two validations. The end is always validated."""
    patience: PositiveInt | None = None
    """Validations without a better score after which the training stops; none: it never stops early."""
    keep: Literal["best", "last"] = "best"
    """Which weights become the model file."""
    tile_px: Annotated[int, Field(ge=32, le=8192)] = 512
    """Tile of validation, and of the model card."""
    margin_px: Annotated[int, Field(ge=0)] = 32

    @model_validator(mode="after")
    def _check(self) -> ValidationConfig:
        if self.metric not in VALIDATION_METRICS and not self.metric.startswith("iou:"):
            raise ValueError(f"metric: must be {', '.join(VALIDATION_METRICS)} or iou:CLASS")
        if 4 * self.margin_px > self.tile_px:
            raise ValueError("margin_px: at most a quarter of tile_px")
        return self


class CheckpointConfig(Section):
    """What a killed training goes on from."""

    every_steps: PositiveInt = 500
    """Steps between two checkpoints; each validation and the end make one too."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept, besides the best."""


class TrackingConfig(Section):
    """Where else the history goes; the Parquet tables are always written."""

    tensorboard: bool = False
    """Write event files to OUTPUT/tensorboard (needs segpipe[tensorboard])."""
    mlflow: str | None = None
    """MLflow tracking URI (needs segpipe[mlflow])."""
    experiment: str = "segpipe"
    """Name of the MLflow experiment."""


class TrainClusterConfig(ExecutorConfig):
    """Where and how widely to train; executor local = one worker."""

    workers: Auto | PositiveInt | tuple[PositiveInt, PositiveInt] = "auto"
    """Workers, or [least, most]: as many as the cluster has; auto = one per GPU, else one."""
    threads_per_worker: Auto | PositiveInt = "auto"
    """Compute threads of one worker; auto = CPUs / workers."""
    loader_threads: Auto | PositiveInt = "auto"
    """Threads that decode and augment beside a worker's steps; auto = its CPUs, 8 at most."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that lost workers are replaced; the training then goes on from its newest checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> TrainClusterConfig:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError("workers: the least comes first")
        if self.executor == "local" and self.workers not in ("auto", 1):
            raise ValueError("workers: executor local runs one worker; use executor: ray for more")
        return self


class TrainConfig(Section):
    """One ``segpipe train``."""

    data: DataConfig
    model: NetworkConfig = NetworkConfig()
    init: InitConfig = InitConfig()
    # A mapping that is checked, so that the rule of epochs or steps speaks where the section is absent.
    train: StepsConfig = Field(default_factory=dict, validate_default=True)
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()
    output: str | None = None
    """URI of the training's folder."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        workers = self.cluster.workers
        batch = self.train.global_batch
        if isinstance(workers, int) and batch % workers:
            near = max(1, round(batch / workers)) * workers
            raise ValueError(
                f"train.global_batch: {batch} samples cannot be shared evenly by {workers} workers; "
                f"{near} can"
            )
        if isinstance(workers, tuple) and batch < workers[1]:
            raise ValueError(f"train.global_batch: {batch} samples are fewer than {workers[1]} workers")
        return self


def load_train(
    text: str | None, overrides: Mapping[str, Any], sets: Sequence[str], where: str
) -> TrainConfig:
    """The config of a YAML ``text``, then ``overrides`` (dotted key -> value), then ``sets`` ("a.b=c").

    Raises `ConfigError` that names unknown keys and values that do not fit.
    """
    fix = "See `segpipe config schema --of train` for all keys."
    return load_model_config(TrainConfig, text, overrides, sets, where, fix, "train")

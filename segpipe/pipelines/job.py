"""What was asked of predict or evaluate, checked and read before anything is started or written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig
from segpipe.config.recipe import masks_recipe, recipe
from segpipe.errors import ConfigError, InputError, nothing_written
from segpipe.masks.run import SUCCESS_KEY, RunInfo, require_run
from segpipe.models.header import read_card_bytes
from segpipe.pipelines.units import missing_units
from segpipe.rasters.labels import parse_label_map
from segpipe.storage import open_storage, read_uri
from segpipe.wording import counted


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked, checked and read, before anything is started or written."""

    config: SegpipeConfig
    card: ModelCard
    model_sha256: str
    recipe: dict[str, Any]
    masks: RunInfo | None = None
    """evaluate --masks: the run whose masks are scored."""
    masks_uri: str | None = None

    @property
    def read_config(self) -> SegpipeConfig:
        """The config that scenes are read by: with ``masks``, what those were made with.

        No pixel is read again then, and so nothing decides any more which of them are data.
        """
        if self.masks is None:
            return self.config
        bands = self.masks.recipe["bands"]
        read = {"bands": bands if isinstance(bands, str) else tuple(bands), "valid": "none"}
        return self.config.model_copy(update={"input": self.config.input.model_copy(update=read)})

    @property
    def output(self) -> str:
        assert self.config.output is not None
        return self.config.output


def make_job(config: SegpipeConfig, *, masks_uri: str | None = None) -> Job:
    """Read the model card (or the run whose masks are scored) and make the recipe. Raises InputError."""
    if config.output is None:
        raise ConfigError("no output", "output", "Give --output URI.")
    if not config.input.scenes:
        raise ConfigError("no input", "input.scenes", "Name scenes, folders, globs or a catalogue.")
    if masks_uri is not None:
        with nothing_written():
            return _make_masks_job(config, masks_uri)
    if config.model is None:
        raise ConfigError("no model", "model", "Give --model URI of a model.safetensors.")
    with nothing_written():
        data = read_uri(config.model)
        card, sha256 = read_card_bytes(data, config.model), hashlib.sha256(data).hexdigest()
    _check_input(config, card)
    return Job(config, card, sha256, recipe(config, card, sha256))


def _make_masks_job(config: SegpipeConfig, masks_uri: str) -> Job:
    """Read the run whose masks are scored; it must be finished, or holes would stand as failures for good."""
    if config.model is not None:
        raise ConfigError("--model and --masks exclude each other", "model", "Give one of them.")
    storage = open_storage(masks_uri)
    masks = require_run(storage)
    if config.output is not None and open_storage(config.output).root == storage.root:
        raise ConfigError("the output is the run of --masks itself", "output", "Choose another --output.")
    if masks.masks_uri is not None:
        raise ConfigError("this run holds scores and no masks", masks_uri, f"Give --masks {masks.masks_uri}.")
    missing, units = missing_units(storage)
    if missing:
        what = f"the run is unfinished: {sum(map(len, missing))} of {counted(units, 'unit')} missing"
        raise InputError(what, masks_uri, "Run the command that made it again.")
    if storage.stat(SUCCESS_KEY) is None:
        what = "the run's masks are there, but not its reports and _SUCCESS"
        raise InputError(what, masks_uri, f"Write them with `segpipe report {masks_uri}`.")
    parse_label_map(config.input.label_map, masks.card.num_classes)
    asked = masks_recipe(masks.recipe_key, config.input.label_map)
    return Job(_as_made(config, masks), masks.card, masks.model_sha256, asked, masks, storage.root)


def _check_input(config: SegpipeConfig, card: ModelCard) -> None:
    """Refuse what would fail in every scene."""
    parse_label_map(config.input.label_map, card.num_classes)
    bands = config.input.bands
    if bands != "auto" and len(bands) != len(card.bands):
        raise ConfigError(
            f"{len(bands)} bands are named, the model takes {len(card.bands)} ({', '.join(card.bands)})",
            "input.bands",
            "Name one band of the file for each band of the model.",
        )


def _as_made(config: SegpipeConfig, masks: RunInfo) -> SegpipeConfig:
    """Return the config with the ``downsample`` that the masks were made with, which the reports tell."""
    changes = {"downsample": masks.recipe["inference"]["downsample"]}
    return config.model_copy(update={"inference": config.inference.model_copy(update=changes)})

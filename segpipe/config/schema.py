"""The JSON schemas of the configs, by command."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from segpipe.config.model import SegpipeConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.config.train import TrainConfig
from segpipe.errors import ConfigError

CONFIGS: Final[dict[str, type[BaseModel]]] = {
    "predict": SegpipeConfig,
    "evaluate": SegpipeConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
}


def config_schema(command: str) -> dict[str, Any]:
    """The JSON schema of a command's config. Raises `ConfigError` for a command without one."""
    if command not in CONFIGS:
        raise ConfigError(f"no config of {command!r}", "--of", f"There are: {', '.join(CONFIGS)}.")
    return CONFIGS[command].model_json_schema()

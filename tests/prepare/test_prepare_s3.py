"""Prepare from object storage to object storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import Heard, files_of, write_camvid

from segpipe.config.prepare import PrepareConfig
from segpipe.pipelines.prepare import run_prepare
from segpipe.storage import open_storage


@pytest.mark.s3
@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_shards_are_made_and_resumed_on_s3(tmp_path: Path, s3_prefix: str, form: str) -> None:
    write_camvid(tmp_path / "in")
    source = open_storage(f"{s3_prefix}/in")
    for name, data in files_of(tmp_path / "in").items():
        source.put(name, data)
    config = PrepareConfig(
        layout="camvid",
        sources=(f"{s3_prefix}/in",),
        output=f"{s3_prefix}/out",
        format=form,
        shard_samples=2,
        cluster={"executor": "local"},
    )
    assert run_prepare(config, Heard()).written == 4
    assert run_prepare(config, Heard()).written == 0
    output = open_storage(f"{s3_prefix}/out")
    first = output.read("dataset.json")
    assert json.loads(first)["samples"] == 7
    # another output whose dataset.json was not reached: its shards are adopted by what they say of themselves
    second = open_storage(f"{s3_prefix}/second")
    for shard in json.loads(first)["shards"]:
        second.put(shard["key"], output.read(shard["key"]))
    assert run_prepare(config.model_copy(update={"output": f"{s3_prefix}/second"}), Heard()).written == 0
    assert second.read("dataset.json") == first

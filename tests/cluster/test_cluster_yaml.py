"""``cluster.yaml`` is what Ray's launcher takes, and keeps its doors shut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from ruamel.yaml import YAML

from segpipe.config.model import SegpipeConfig
from segpipe.pipelines.resources import Hardware, plan_pool

CLUSTER_YAML = Path(__file__).resolve().parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return YAML(typ="safe").load(CLUSTER_YAML)  # type: ignore[no-any-return]


def node_configs(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in cluster["available_node_types"].items():
        yield name, node["node_config"]


def test_it_fits_the_schema_of_the_ray_that_is_installed(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-")
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_no_node_is_open_and_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    options = " ".join(cluster["docker"]["run_options"])
    (token_path,) = cluster["file_mounts"]
    assert "RAY_AUTH_MODE=token" in options
    assert f"RAY_AUTH_TOKEN_PATH={token_path}" in options
    assert f"chmod 600 {token_path}" in cluster["setup_commands"]
    for name, config in node_configs(cluster):
        assert config["MetadataOptions"]["HttpTokens"] == "required", name
        assert config["SecurityGroupIds"], name
        assert config["IamInstanceProfile"]["Arn"], f"{name}: Ray would make a wide profile of its own"
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_the_head_does_no_work_and_the_workers_are_spot(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    for name, node in types.items():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
        assert node["min_workers"] == node["max_workers"], f"{name}: the pool is sized once"
    assert sum(node["max_workers"] for node in types.values()) <= cluster["max_workers"]
    types[cluster["head_node_type"]] = head


def test_the_pool_uses_every_gpu_of_it(cluster: dict[str, Any]) -> None:
    nodes = [
        node["resources"]
        for node in cluster["available_node_types"].values()
        for _ in range(node["min_workers"])
    ]
    gpus = sum(node.get("GPU", 0) for node in nodes)
    hardware = Hardware(
        len(nodes), sum(node["CPU"] for node in nodes), gpus,
        cpus_per_node=min(node["CPU"] for node in nodes), gpus_per_node=1,
    )  # fmt: skip
    pool = plan_pool(hardware, SegpipeConfig())
    assert (pool.workers, pool.gpus_per_worker) == (gpus, 1)
    assert 1 <= pool.cpus_per_worker <= min(node["CPU"] for node in nodes)

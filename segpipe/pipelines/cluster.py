"""The Ray executor: units as a Ray Data pipeline over a fixed pool of workers, Ray tasks for the rest."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayError, RayTaskError

from segpipe.config.card import ModelCard
from segpipe.config.model import SegpipeConfig
from segpipe.errors import IncompleteError, InputError, SegpipeError, first_line
from segpipe.imports import collect_as_usual, collect_rarely
from segpipe.masks.plan import PlanScene
from segpipe.pipelines.cpus import usable_cpus
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.pipelines.isolate import Isolation
from segpipe.pipelines.local import inspect_sources
from segpipe.pipelines.resources import Hardware, Pool, gpu_precision, this_machine
from segpipe.pipelines.units import PartUnits, Unit
from segpipe.pipelines.worker import UnitResult, Worker, WorkerSetup
from segpipe.rasters.scene import SceneSource
from segpipe.wording import counted

Item = TypeVar("Item")
Value = TypeVar("Value")

_SOURCES_PER_TASK = 250
_MAX_RESTARTS = 4
_ISOLATE_UNITS = 200
# Ray replaces 127.0.0.1 by the machine's own address; only Linux answers on all of 127.0.0.0/8.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_WAVE_TASKS = 200
"""Tasks a worker between two starts of the pool, which take seconds."""
_MAX_WAVE_TASKS = 5_000
_NO_PROGRESS_TIMEOUT_S = 2 * 3600
_FREED_AFTER_S = 5
"""The books of a cluster lag behind: what tasks of this driver held a moment ago is not free at once."""
_ANSWER_S = 60
"""A process that imports torch takes its time to start."""
_OBJECT_STORE_BYTES = 100 * 2**20


class RayExecutor:
    """Runs on a Ray cluster, or on a Ray that it starts in-process on loopback and stops again."""

    def __init__(self, address: str | None, warn: Callable[[str], None] = lambda _: None) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        _start_ray(self._address)
        try:
            self.hardware = _cluster_hardware(self._address, warn) if self._address else this_machine()
        except BaseException:
            self.close()
            raise

    def inspect(
        self, sources: Sequence[SceneSource], config: SegpipeConfig, card: ModelCard
    ) -> Iterator[PlanScene]:
        if len(sources) <= _SOURCES_PER_TASK:
            yield from inspect_sources(sources, config, card)
            return
        chunks = [sources[i : i + _SOURCES_PER_TASK] for i in range(0, len(sources), _SOURCES_PER_TASK)]

        def inspect_chunk(chunk: Sequence[SceneSource]) -> list[PlanScene]:
            return list(inspect_sources(chunk, config, card))

        for scenes in self.map_ordered(inspect_chunk, chunks):
            yield from scenes

    def run(self, setup: WorkerSetup, pool: Pool, tasks: Sequence[PartUnits]) -> Iterator[UnitResult]:
        # In waves: every task costs the driver some 60 kB of Ray's book-keeping until its dataset ends.
        size = min(_MAX_WAVE_TASKS, _WAVE_TASKS * pool.workers)
        for start in range(0, len(tasks), size):
            yield from self._run_wave(setup, pool, tasks[start : start + size])

    def _run_wave(self, setup: WorkerSetup, pool: Pool, tasks: Sequence[PartUnits]) -> Iterator[UnitResult]:
        num_units, first = sum(map(len, tasks)), True
        while True:
            ended = fresh = 0
            for result in self._run_pool(setup, pool, tasks):
                ended += 1
                # The second time most units are there already, and have been told of.
                if first or not result.skipped:
                    fresh += result.status == "done"
                    yield result
            # A pool whose restarts are used up (nodes that come and go) is made anew while it gets on.
            if not fresh or num_units - ended <= _ISOLATE_UNITS * pool.workers:
                return
            first = False

    def _run_pool(self, setup: WorkerSetup, pool: Pool, tasks: Sequence[PartUnits]) -> Iterator[UnitResult]:
        import ray.data.exceptions

        _configure_data(ray.data.DataContext.get_current())
        with warnings.catch_warnings():
            # Restarts and retries have no named parameter in the Ray versions that we allow.
            warnings.simplefilter("ignore", DeprecationWarning)
            # A row a task: made here, where rows of Arrow tables would first be counted by a Ray task.
            rows = [{"part": task.part, "units": task.units.tolist()} for task in tasks]
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                PoolWorker,
                fn_constructor_args=(setup,),
                compute=ray.data.ActorPoolStrategy(
                    size=pool.workers,
                    max_concurrent_calls_per_actor=2,
                    max_tasks_in_flight_per_actor=4,
                    enable_true_multi_threading=True,
                ),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=pool.cpus_per_worker,
                num_gpus=pool.gpus_per_worker or None,
                # Finite also where a worker ends while it starts, which costs no task a try.
                max_restarts=_MAX_RESTARTS,
                max_task_retries=1,
            )
        collect_as_usual()  # Ray Data's loop does leave garbage
        try:
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    if (fault := row.pop("fault")) is not None:
                        raise decode_fault(fault)
                    yield UnitResult(**row)
        except (RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
            raise _stopped(error, setup.run_uri) from error

    def isolate(self, setup: WorkerSetup, pool: Pool, units: Sequence[Unit]) -> Iterator[UnitResult]:
        return Isolation(setup, pool, units).results()

    def map_ordered(self, function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
        task = ray.remote(num_cpus=1, max_retries=3)(function)
        limit = 2 * max(1, self.hardware.cpus)
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(task.remote(item))
            if len(waiting) >= limit:
                yield _task_value(waiting.popleft())
        while waiting:
            yield _task_value(waiting.popleft())

    def busy(self, workers: int, cpus: float, gpus: int) -> str | None:
        if not self._address:
            return None
        needed = {"CPU": workers * cpus, "GPU": float(workers * gpus)}
        end = time.monotonic() + _FREED_AFTER_S
        while True:
            free = ray.available_resources()
            short = [kind for kind, amount in needed.items() if free.get(kind, 0) < amount - 1e-3]
            if not short:
                return None
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        lacks = " and ".join(f"{needed[kind]:g} {kind} ({free.get(kind, 0):g} free now)" for kind in short)
        return f"others use the cluster: {counted(workers, 'worker')} must wait for {lacks}"

    def close(self) -> None:
        ray.shutdown()
        _print_ray_messages(True)


class PoolWorker:
    """A worker as Ray Data sees it: rows of unit names in, one row per unit out."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._fault: str | None = None
        collect_rarely()
        try:
            self._worker = Worker(setup)
        except Exception as error:
            self._fault = encode_fault(error)

    def __call__(self, batch: Any) -> Iterator[Any]:
        if self._fault is not None:
            yield _result_table(UnitResult(-1, -1, "deferred"), self._fault)
            return
        tasks = zip(batch["part"].to_pylist(), batch["units"].to_pylist(), strict=True)
        try:
            for result in self._worker.run_units((part, unit) for part, units in tasks for unit in units):
                if result.device_failed:
                    # A process never gets its GPU back after a fault of it; another one takes the units.
                    os._exit(1)
                yield _result_table(result)
        except SegpipeError as error:
            self._fault = encode_fault(error)
            yield _result_table(UnitResult(-1, -1, "deferred"), self._fault)


_ARROW_TYPES = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()}
_RESULT_SCHEMA = pa.schema(
    [(item.name, _ARROW_TYPES[str(item.type)]) for item in fields(UnitResult)] + [("fault", pa.string())]
)


def _result_table(result: UnitResult, fault: str | None = None) -> Any:
    return pa.Table.from_pylist([asdict(result) | {"fault": fault}], schema=_RESULT_SCHEMA)


def _task_value(call: Any) -> Any:
    """Wait for a task; an error of ours comes as it was raised, without Ray's traceback as its text."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, SegpipeError):
            raise error.cause from None
        raise
    except RayError as error:
        raise _stopped(error, "") from error


def _stopped(error: Exception, where: str) -> IncompleteError:
    return IncompleteError(
        f"Ray stopped the run ({first_line(error)})",
        where,
        "Look at the cluster's nodes and their memory; the same command goes on where this one stopped.",
    )


def _configure_data(context: Any) -> None:
    # Ray Data sets its log levels when it is imported.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    # A task whose worker died for good is dropped here; its units are missing, and so are run again alone.
    context.max_errored_blocks = -1
    context.max_consecutive_actor_init_deaths = 2
    # A large unit of a slow model takes long, and nothing is lost by waiting.
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    context.print_on_execution_start = False


def _start_ray(address: str | None) -> None:
    """Join the cluster at ``address``, or start Ray on loopback with a token that is only in memory."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # No usage reports: Ray Data would start a process for them and ask localhost for Prometheus.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    # Ray's core reports every actor that has arguments and may restart as an error on stderr.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handlers = _main_thread_handlers()
    _print_ray_messages(False)
    try:
        with _silent_stderr():
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                # Ray turns token mode on by itself, and writes no token file where this one is set.
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                ray.init(
                    # Not a Ray that someone else runs on this machine.
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    num_cpus=usable_cpus(),
                    _node_ip_address=_LOOPBACK,
                )
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Ray cannot be reached ({first_line(error)})",
            address or "a local Ray",
            "Check cluster.address and RAY_ADDRESS, or use --set cluster.executor=local.",
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 nowhere while Ray's core starts: it prints a line about its log level."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _print_ray_messages(enabled: bool) -> None:
    """Switch what Ray prints by itself, of workers that die, to stdout of all places: that is for results."""
    ray._private.worker._worker_logs_enabled = enabled


def _main_thread_handlers() -> dict[signal.Signals, Any]:
    """Return the signal handlers that ray.init would replace by its own."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def _cluster_hardware(address: str, warn: Callable[[str], None]) -> Hardware:
    """Ask the nodes what they have. Raises InputError where none has a CPU for work."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise InputError(
            "the cluster has no CPUs for work", address, "Wait for its nodes, or raise min_workers."
        )
    # A GPU beside no CPU for work can hold no worker.
    holders = [node for node in nodes if node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1]
    return Hardware(
        nodes=len(cpus),
        cpus=sum(cpus),
        gpus=sum(int(node["GPU"]) for node in holders),
        gpu_precision=lambda: _ask_a_gpu(warn),
        cpus_per_node=min((int(node["CPU"]) for node in holders), default=min(cpus)),
        gpus_per_node=max((int(node["GPU"]) for node in holders), default=0),
        least_cpus=min(cpus),
    )


def _ask_a_gpu(warn: Callable[[str], None]) -> str:
    call = ray.remote(num_gpus=1, num_cpus=0)(gpu_precision).remote()
    ready, _ = ray.wait([call], timeout=_ANSWER_S)
    if not ready:
        warn("others use the cluster: no GPU has answered yet what it computes in; waiting for one")
    return str(_task_value(call))

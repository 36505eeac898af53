"""The workers of a training on Ray: Ray Train starts, connects and replaces them.

Checkpoints are this package's own objects in the training's storage; Ray Train keeps no state. Workers tell
the driver of steps and faults through a small actor, the board.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segpipe.errors import IncompleteError, first_line
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.training.comm import Comm
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.resources import TrainPool
from segpipe.training.worker import Tell, WorkerTask, run_worker
from segpipe.wording import counted

_POLL_S: Final = 0.5
_COLLECTIVE_TIMEOUT_S: Final = 1800
_ROOM_LOOK_S: Final = 10
_ROOM_WAIT_S: Final = 45  # nodes of an autoscaler take minutes, a free place a moment
_LOOPBACK: Final = "127.0.0.1"
_LOOPBACK_INTERFACE: Final = "lo" if sys.platform == "linux" else "lo0"


class Board:
    """What workers tell: lines and scores in order, the newest step, the first fault."""

    def __init__(self) -> None:
        self._told: list[StepRow | ScoreRow | str] = []
        self._fault: str | None = None

    def tell(self, what: list[StepRow | ScoreRow | str]) -> None:
        self._told += what

    def fail(self, fault: str) -> None:
        self._fault = self._fault or fault

    def take(self) -> tuple[list[StepRow | ScoreRow | str], str | None]:
        """All that was told since the last call, and the fault that ended a worker."""
        told, self._told = self._told, []
        return told, self._fault


def train_on_ray(task: WorkerTask, pool: TrainPool, tell: Tell) -> None:
    """Run the workers to their end. Ray is started already.

    Raises what a worker raised, or `IncompleteError` where workers were lost more often than is allowed.
    """
    _configure_train(_is_local(task))
    # On the driver's node: one that is taken away must not take the board along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    with tempfile.TemporaryDirectory(prefix="segpipe-train-", ignore_cleanup_errors=True) as folder:
        ended: list[BaseException | None] = []
        # In a thread of its own, so that Ctrl-C is heard here and the board is read meanwhile.
        thread = threading.Thread(target=_fit, args=(task, pool, board, folder, ended), daemon=True)
        thread.start()
        room = _RoomWatch(pool, tell)
        while thread.is_alive():
            thread.join(_POLL_S)
            _read_board(board, tell, task.output)
            room.look()
        _read_board(board, tell, task.output)
    error = ended[0] if ended else None
    if error is not None:
        raise IncompleteError(
            f"the workers were lost ({_reason(error)})",
            task.output,
            "The same command goes on from the newest checkpoint.",
        ) from error


class _RoomWatch:
    """Says so once where the workers find no place: Ray Train waits without an end, and without a word."""

    def __init__(self, pool: TrainPool, tell: Tell) -> None:
        kinds = f"{pool.cpus_per_worker:g} CPU" + (" and 1 GPU" if pool.device == "cuda" else "")
        workers = counted(pool.least, "worker")
        self._line = f"waiting for nodes, or for other jobs to end: {workers} of {kinds} each"
        # Below its least number an elastic training asks for no placement group at all.
        self._elastic = pool.least != pool.most
        self._tell = tell
        self._job_id = ray.get_runtime_context().get_job_id()
        self._looked_s = self._placed_s = time.monotonic()
        self._told = False

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < _ROOM_LOOK_S:
            return
        self._looked_s = now_s
        try:
            groups = ray.util.placement_group_table().items()
        except RayError:
            return  # the board tells of it
        # Those of all jobs are there; an id ends with its job's.
        states = {group["state"] for name, group in groups if name.endswith(self._job_id)} - {"REMOVED"}
        if states == {"CREATED"} or not (states or self._elastic):
            self._placed_s, self._told = now_s, False
        elif now_s - self._placed_s > _ROOM_WAIT_S and not self._told:
            self._told = True
            self._tell(self._line)


def _is_local(task: WorkerTask) -> bool:
    """Whether Ray was started in-process: all workers are on this machine."""
    return not (task.config.cluster.address or os.environ.get("RAY_ADDRESS"))


def _configure_train(local: bool) -> None:
    """Ray Train reads these in the driver, and hands most of them on."""
    # Nobody collects its figures; without this it looks for a collector.
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    if local:  # a machine that is taken away takes the driver with it: no process has to watch for that
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def _reason(error: BaseException) -> str:
    """One line that names what ended the workers; a worker that only met the loss of another says less."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [each.cause if isinstance(each, RayTaskError) else each for each in failures.values()]
    causes = [each for each in causes if not _is_echo(each)] or causes
    if not causes:
        return first_line(getattr(error, "controller_failure", error))
    name = "" if isinstance(causes[0], RayError) else f"{type(causes[0]).__name__}: "
    return name + first_line(causes[0])


def _is_echo(error: BaseException) -> bool:
    text = str(error)
    return "Connection closed by peer" in text or "Connection reset by peer" in text


def _read_board(board: Any, tell: Tell, where: str) -> None:
    try:
        told, fault = ray.get(board.take.remote(), timeout=60)
    except RayError as error:
        raise IncompleteError(
            f"Ray stopped the training ({first_line(error)})", where, "The same command goes on."
        ) from error
    for what in told:
        tell(what)
    if fault is not None:
        raise decode_fault(fault)


def _fit(
    task: WorkerTask, pool: TrainPool, board: Any, folder: str, ended: list[BaseException | None]
) -> None:
    try:
        _trainer(task, pool, board, folder).fit()
        ended.append(None)
    except BaseException as error:  # told to the thread that waits
        ended.append(error)


def _trainer(task: WorkerTask, pool: TrainPool, board: Any, folder: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    on_gpu = pool.device == "cuda"
    config = LoopbackConfig if _is_local(task) else TorchConfig
    return TorchTrainer(
        _worker_main,
        train_loop_config={"task": task, "pool": pool, "board": board},
        scaling_config=ScalingConfig(
            num_workers=pool.least if pool.least == pool.most else (pool.least, pool.most),
            use_gpu=on_gpu,
            resources_per_worker={"CPU": pool.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        # gloo beside nccl: small counts are exchanged without waiting for the GPU.
        torch_config=config(
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        run_config=RunConfig(
            name="training",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=task.config.cluster.max_failures),
        ),
    )


class LoopbackConfig(TorchConfig):
    """For workers that are all on this machine: they meet, and gloo listens, on loopback only.

    Ray Train's own way opens a port on all interfaces that asks nobody who he is.
    """

    @property
    def backend_cls(self) -> type[LoopbackBackend]:
        return LoopbackBackend


class LoopbackBackend(Backend):
    """Connects the workers; Ray Train's callbacks call this in the controller."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        from ray.train.torch.config import _set_torch_distributed_env_vars

        worker_group.execute(_set_torch_distributed_env_vars)
        port, world = worker_group.execute_single(0, _listen), len(worker_group)
        backend, timeout_s = backend_config.backend, backend_config.timeout_s
        ray.get(
            [
                worker_group.execute_single_async(rank, _meet, backend, rank, world, port, timeout_s)
                for rank in range(world)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        from ray.train.torch.config import _TorchBackend

        _TorchBackend().on_shutdown(worker_group, backend_config)


_listening: list[socket.socket] = []
"""Worker 0's end between `_listen` and `_meet`."""


def _listen() -> int:
    """Open worker 0's port, on loopback."""
    end = socket.create_server((_LOOPBACK, 0))
    _listening.append(end)
    return int(end.getsockname()[1])


def _meet(backend: str, rank: int, world: int, port: int, timeout_s: int) -> None:
    """Join the group of all workers, as worker ``rank``."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
    timeout = timedelta(seconds=timeout_s)
    handle = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, world, is_master=rank == 0, timeout=timeout, master_listen_fd=handle
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _worker_main(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    board, pool = config["board"], config["pool"]
    device = str(ray.train.torch.get_device()) if pool.device == "cuda" else "cpu"
    teller = _BoardTeller(board)
    comm = Comm(context.get_world_rank(), context.get_world_size())
    try:
        run_worker(config["task"], comm, device, pool.loader_threads, teller)
        teller.flush()
    except Exception as error:
        if not _may_pass(error):
            ray.get(board.fail.remote(encode_fault(error)))
        raise


def _may_pass(error: Exception) -> bool:
    """Whether new workers may get on: another worker was lost, or the GPU failed."""
    import torch
    import torch.distributed as dist

    if isinstance(error, (dist.DistError, torch.AcceleratorError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "CUDA", "NCCL"))


class _BoardTeller:
    """Sends steps at most twice a second, and what else there is at once."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._waiting: StepRow | None = None
        self._sent_s = 0.0

    def __call__(self, what: StepRow | ScoreRow | str) -> None:
        if isinstance(what, StepRow):
            self._waiting = what
            if time.monotonic() - self._sent_s >= _POLL_S:
                self.flush()
            return
        self.flush()
        self._board.tell.remote([what])

    def flush(self) -> None:
        if self._waiting is not None:
            self._board.tell.remote([self._waiting])
            self._waiting, self._sent_s = None, time.monotonic()

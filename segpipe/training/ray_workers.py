"""The workers of a training on Ray: Ray Train starts, connects and replaces them.

Checkpoints are this package's own objects in the training's storage; Ray Train keeps no state. Workers tell
the driver of steps and faults through a small actor, the board.
"""

from __future__ import annotations

import tempfile
import threading
import time
from typing import Any, Final

import ray
from ray.exceptions import RayError

from segpipe.errors import IncompleteError
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.pipelines.isolate import first_line
from segpipe.training.comm import Comm
from segpipe.training.history import ScoreRow, StepRow
from segpipe.training.resources import TrainPool
from segpipe.training.worker import Tell, WorkerTask, run_worker

_POLL_S: Final = 0.5
_COLLECTIVE_TIMEOUT_S: Final = 1800


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
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    with tempfile.TemporaryDirectory(prefix="segpipe-train-", ignore_cleanup_errors=True) as folder:
        ended: list[BaseException | None] = []
        # In a thread of its own, so that Ctrl-C is heard here and the board is read meanwhile.
        thread = threading.Thread(target=_fit, args=(task, pool, board, folder, ended), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            _read_board(board, tell)
        _read_board(board, tell)
    error = ended[0] if ended else None
    if error is not None:
        raise IncompleteError(
            f"the workers were lost ({first_line(error)})",
            task.output,
            "The same command goes on from the newest checkpoint.",
        ) from error


def _read_board(board: Any, tell: Tell) -> None:
    try:
        told, fault = ray.get(board.take.remote(), timeout=60)
    except RayError as error:
        raise IncompleteError(
            f"Ray stopped the training ({first_line(error)})", "", "The same command goes on."
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
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = pool.device == "cuda"
    return TorchTrainer(
        _worker_main,
        train_loop_config={"task": task, "pool": pool, "board": board},
        scaling_config=ScalingConfig(
            num_workers=pool.least if pool.least == pool.most else (pool.least, pool.most),
            use_gpu=on_gpu,
            resources_per_worker={"CPU": pool.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        # gloo beside nccl: small counts are exchanged without waiting for the GPU.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        run_config=RunConfig(
            name="training",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=task.config.cluster.max_failures),
        ),
    )


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
    except RuntimeError:
        raise  # what the others meet when a worker is lost: the group is made anew
    except Exception as error:
        ray.get(board.fail.remote(encode_fault(error)))
        raise


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

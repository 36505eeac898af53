"""What a worker's end says about its unit, by Ray's own exceptions; and errors that cross processes."""

from __future__ import annotations

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
)

from segpipe.errors import InputError, SceneError, SegpipeError, StorageRefused
from segpipe.pipelines.faults import decode_fault, encode_fault
from segpipe.pipelines.isolate import died_alone, first_line

ACTOR_ID = ray.ActorID.nil().binary()
PLAIN = ActorDiedErrorContext(
    actor_id=ACTOR_ID,
    error_message="Worker unexpectedly exits. There are some potential root causes. (1) The process is "
    "killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called.",
)
PREEMPTED = ActorDiedErrorContext(
    actor_id=ACTOR_ID, node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
)


def test_a_plain_death_on_a_living_node_is_the_units_own() -> None:
    error = ActorDiedError(PLAIN)
    assert "memory" in str(error), "Ray's text speaks of memory in every plain death"
    assert died_alone(error, "node", lambda: {"node", "other"})


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(PREEMPTED),
        ActorUnavailableError("connection lost", ACTOR_ID),
        OutOfMemoryError("the node was short of memory"),
        NodeDiedError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_end_from_outside_is_not(error: RayError) -> None:
    assert not died_alone(error, "node", lambda: {"node"})


def test_a_death_with_its_node_is_not() -> None:
    assert not died_alone(ActorDiedError(PLAIN), "node", lambda: {"other"})


@pytest.mark.parametrize(
    "error",
    [
        SegpipeError("a"),
        InputError("what", "where", "fix"),
        StorageRefused("no", "s3://b"),
        SceneError("decode", "what", "where"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_ours_comes_to_the_driver_as_it_was(error: SegpipeError) -> None:
    there = decode_fault(encode_fault(error))
    assert type(there) is type(error)
    assert (str(there), there.args) == (str(error), error.args)


def test_any_other_error_comes_by_name_and_text() -> None:
    there = decode_fault(encode_fault(ZeroDivisionError("by zero")))
    assert isinstance(there, RuntimeError)
    assert "ZeroDivisionError: by zero" in str(there)
    assert first_line(RayError("one\ntwo")) == "one"
    assert first_line(RayError("")) == "RayError"

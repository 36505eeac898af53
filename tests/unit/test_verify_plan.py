"""verify against the plan: what it counts, and a plan that is damaged, gone or not there yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from masks_run import MadeScene, build_run, damage

from segpipe.masks.run import plan_key
from segpipe.masks.verify import verify_run

SCENES = (MadeScene("big", 150, 190), MadeScene("small"), MadeScene("tail", 64, 65))


def test_a_run_that_has_no_plan_yet_is_not_whole(tmp_path: Path) -> None:
    found = verify_run(build_run(str(tmp_path), [], success=False).storage)
    assert (found.exit_code, found.complete) == (3, False)


def test_the_ledger_adds_up_with_empty_failed_and_unreadable_scenes(tmp_path: Path) -> None:
    scenes = [
        MadeScene("a", 150, 190, failed={0: "decode", 3: "scene_changed"}),
        MadeScene("b", empty=True),
        MadeScene("c", unreadable="header"),
        MadeScene("d", pixel_m=None, valid_source="alpha"),
        MadeScene("e", coarser=True, pixel_m=2.0),
    ]
    run = build_run(str(tmp_path), [scenes])
    found = verify_run(run.storage, full=True)
    assert found.exit_code == 0
    tree = json.loads(json.dumps(found.to_tree()))["ledger"]
    lines = {(line["status"], line["kind"]): line for line in tree["lines"]}
    assert set(lines) == {
        ("ok", None),
        ("empty", None),
        ("failed", "decode"),
        ("failed", "scene_changed"),
        ("failed", "header"),
    }
    assert sum(line["pixels"] for line in lines.values()) == 150 * 190 + 3 * 40 * 50
    assert lines["failed", "header"]["blocks"] == 1
    assert lines["empty", None]["km2"] == pytest.approx(40 * 50 * 0.25 / 1e6)
    assert lines["ok", None]["unknown_px"] == 40 * 50
    assert lines["ok", None]["scenes"] == 3
    assert tree["planned"]["scenes"] == 5
    assert tree["valid_sources"] == {"alpha": 1, "nodata": 3, "not opened": 1}
    assert tree["coarser_than_model"] == {"count": 1, "first": ["e"]}


def test_replaced_scenes_are_counted_apart_and_the_run_still_adds_up(tmp_path: Path) -> None:
    first = [MadeScene("a"), MadeScene("b", 130, 140)]
    second = [MadeScene("a", version="new", coarser=True), MadeScene("c")]
    third = [MadeScene("a", version="newest")]
    run = build_run(str(tmp_path), [first, second, third], replaces={1: {"a": 0}, 2: {"a": 1}})
    found = verify_run(run.storage)
    assert (found.exit_code, found.parts) == (0, 3)
    assert found.ledger.superseded_scenes == 2
    assert found.ledger.lines["superseded", None].pixels == 2 * 40 * 50
    assert found.ledger.lines["ok", None].pixels == 130 * 140 + 2 * 40 * 50
    assert found.ledger.coarser.count == 0
    assert found.ledger.balanced


@pytest.mark.parametrize("keep", [0, 50, -20])
def test_a_damaged_part_of_the_plan_is_named(tmp_path: Path, keep: int) -> None:
    run = build_run(str(tmp_path), [[MadeScene("a")], [MadeScene("b")]])
    path = run.storage.local_path(plan_key(0))
    assert path is not None
    path.write_bytes(path.read_bytes()[:keep])
    found = verify_run(run.storage)
    assert damage(found, plan_key(0))
    assert (found.units_checked, found.unplanned.count) == (1, 0)


def test_a_part_of_the_plan_that_is_gone_is_named_and_its_objects_are_unplanned(tmp_path: Path) -> None:
    run = build_run(str(tmp_path), [[MadeScene("a")], [MadeScene("b")]])
    run.storage.local_path(plan_key(0)).unlink()  # type: ignore[union-attr]
    found = verify_run(run.storage)
    assert found.damaged.first[0].startswith(plan_key(0))
    assert found.unplanned.first == [run.key(0)]
    assert found.plan_damaged


class AnyOrder:
    """A storage that lists by the end of the names, so that the parts of a run lie among each other."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def list(self, prefix: str = "") -> Iterator[Any]:
        found = [info for page in self._storage.list(prefix) for info in page]
        for info in sorted(found, key=lambda info: info.key[::-1]):
            yield [info]


def test_a_store_may_list_in_any_order(tmp_path: Path) -> None:
    run = build_run(str(tmp_path), [[MadeScene("a", 150, 190)], [MadeScene("b", 150, 190)]])
    strange = "masks/part-00000/note.txt"
    run.storage.put(strange, b"x")
    found = verify_run(AnyOrder(run.storage))
    assert found.unplanned.first == [strange]
    assert (found.missing.count, found.damaged.count, found.success) == (0, 0, "right")


def test_units_that_do_not_follow_from_the_scenes_are_damage_of_the_plan(tmp_path: Path) -> None:
    run = build_run(str(tmp_path), [SCENES])
    table = pq.read_table(run.storage.local_path(plan_key(0)))
    units = table["units"].to_pylist()
    units[-1] += 1
    index = table.schema.get_field_index("units")
    table = table.set_column(index, table.schema.field(index), pa.array(units, pa.int32()))
    pq.write_table(table, run.storage.local_path(plan_key(0)))
    assert "its size gives" in damage(verify_run(run.storage), plan_key(0))

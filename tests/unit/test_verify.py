"""verify: what is whole passes, and every way in which a run can be wrong is found and named."""

from __future__ import annotations

import io
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from masks_run import MadeRun, MadeScene, build_run, damage, make_info, put_unit, success_totals, unit_rows
from rich.console import Console

from segpipe.config.recipe import RUN_KEY
from segpipe.errors import InputError
from segpipe.masks.codec import encode_mask
from segpipe.masks.ledger import Line, RunTotals
from segpipe.masks.plan import load_part
from segpipe.masks.run import SUCCESS_KEY
from segpipe.masks.schema import mask_schema
from segpipe.masks.verify import Finding, verify_run
from segpipe.masks.write import encode_unit
from segpipe.reports.ledger import render_ledger
from segpipe.storage import open_storage

SCENES = (
    MadeScene("big", 150, 190, labelled=True),
    *(MadeScene(f"small/{i}", 30 + i, 41, labelled=i % 2 == 0) for i in range(20)),
    MadeScene("tail", 64, 65),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return build_run(str(tmp_path_factory.mktemp("built")), [SCENES])


@pytest.fixture
def run(built: MadeRun, tmp_path: Path) -> MadeRun:
    """Return a copy of one finished run, to be damaged."""
    shutil.copytree(built.storage.root, tmp_path / "run")
    return replace(built, storage=open_storage(str(tmp_path / "run")))


def path_of(run: MadeRun, unit: int, part: int = 0) -> Path:
    path = run.storage.local_path(run.key(unit, part))
    assert path is not None
    return path


def rows_of(run: MadeRun, unit: int) -> list[dict[str, Any]]:
    part = load_part(run.storage, 0, run.info.facts)
    return unit_rows(part, unit, {scene.scene_id: scene for scene in SCENES})


@pytest.mark.parametrize("full", [False, True])
def test_a_finished_run_is_whole(run: MadeRun, full: bool) -> None:
    found = verify_run(run.storage, full=full)
    assert found.exit_code == 0
    assert found.success == "right"
    assert found.units_checked == run.num_units[0] > 3
    assert found.ledger.balanced
    assert found.bytes_compared is full


def test_verify_works_through_any_storage() -> None:
    run = build_run(f"memory://{uuid.uuid4().hex}", [SCENES])
    assert verify_run(run.storage, full=True).exit_code == 0
    data = bytearray(run.storage.read(run.key(1)))
    data[len(data) // 3] ^= 1
    run.storage.put(run.key(1), bytes(data))
    assert verify_run(run.storage, full=True).exit_code == 4


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.json"):
        verify_run(open_storage(str(tmp_path)))


def test_a_run_of_a_newer_format_is_refused(run: MadeRun) -> None:
    tree = json.loads(run.storage.read(RUN_KEY))
    run.storage.put(RUN_KEY, json.dumps(tree | {"format": tree["format"] + 1}).encode())
    with pytest.raises(InputError, match=rf"format {tree['format'] + 1}.* reads up to {tree['format']}"):
        verify_run(run.storage)


def test_a_missing_unit_is_named_and_its_blocks_stand_in_the_ledger(run: MadeRun) -> None:
    expected = len(rows_of(run, 2))
    path_of(run, 2).unlink()
    found = verify_run(run.storage)
    assert found.exit_code == 3
    assert found.missing.first == [run.key(2)]
    assert found.ledger.lines["missing", None].blocks == expected
    assert found.ledger.balanced


def test_all_units_missing_is_an_unfinished_run(run: MadeRun) -> None:
    for unit in range(run.num_units[0]):
        path_of(run, unit).unlink()
    run.storage.local_path(SUCCESS_KEY).unlink()  # type: ignore[union-attr]
    found = verify_run(run.storage)
    assert (found.exit_code, found.missing.count, found.success) == (3, run.num_units[0], "absent")


def test_damage_wins_over_missing_units(run: MadeRun) -> None:
    path_of(run, 2).unlink()
    path_of(run, 1).write_bytes(b"PAR1")
    found = verify_run(run.storage)
    assert (found.exit_code, found.missing.count) == (4, 1)
    assert damage(found, run.key(1))


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -9])
def test_a_truncated_object_is_damaged(run: MadeRun, keep: int) -> None:
    path = path_of(run, 1)
    path.write_bytes(path.read_bytes()[:keep])
    assert damage(verify_run(run.storage), run.key(1))


def test_a_flipped_byte_in_a_mask_is_found_without_decoding_it(run: MadeRun) -> None:
    path = path_of(run, 0)
    data = bytearray(path.read_bytes())
    for at in [i for i in range(len(data)) if data[i : i + 4] == b"IDAT"]:
        broken = bytearray(data)
        broken[at + 6] ^= 0x01
        path.write_bytes(broken)
        assert "checksum" in damage(verify_run(run.storage), run.key(0))


@pytest.mark.parametrize("fraction", [0.0, 0.11, 0.23, 0.37, 0.5, 0.61, 0.72, 0.83, 0.94, 0.9999])
def test_a_flipped_byte_anywhere_is_found_by_a_full_check(run: MadeRun, fraction: float) -> None:
    path = path_of(run, 1)
    data = bytearray(path.read_bytes())
    data[int(len(data) * fraction)] ^= 0x10
    path.write_bytes(data)
    assert damage(verify_run(run.storage, full=True), run.key(1))


def test_an_object_copied_over_another_is_damaged(run: MadeRun) -> None:
    path_of(run, 3).write_bytes(path_of(run, 2).read_bytes())
    assert "the plan says" in damage(verify_run(run.storage), run.key(3))


def test_an_object_of_another_recipe_is_damaged(run: MadeRun) -> None:
    put_unit(run.storage, replace(run.info, recipe_key="1" * 64), 0, 1, rows_of(run, 1))
    assert "another recipe" in damage(verify_run(run.storage), run.key(1))


def test_objects_without_file_metadata_or_columns_are_damaged(run: MadeRun) -> None:
    path = path_of(run, 1)
    table = pq.read_table(path)
    kept = {name: value for name, value in table.schema.metadata.items() if name.startswith(b"segpipe")}
    pq.write_table(table.replace_schema_metadata(kept), path)
    assert "lacks 'geo'" in damage(verify_run(run.storage), run.key(1))
    pq.write_table(table.drop_columns(["status"]), path)
    assert "no column 'status'" in damage(verify_run(run.storage), run.key(1))


def test_columns_that_a_newer_version_adds_are_passed_over(run: MadeRun) -> None:
    path = path_of(run, 1)
    table = pq.read_table(path)
    pq.write_table(table.append_column("confidence", table["valid_px"]), path)
    found = verify_run(run.storage)
    assert found.damaged.count == 1  # only the size in _SUCCESS no longer agrees
    assert found.damaged.first[0].startswith(SUCCESS_KEY)


Change = Callable[[list[dict[str, Any]]], object]


def _set(**values: Any) -> Change:
    return lambda rows: rows[0].update(values)


BAD_ROWS: dict[str, tuple[Change, str]] = {
    "row removed": (lambda rows: rows.pop(0), "rows, the plan says"),
    "row doubled": (lambda rows: rows.insert(0, dict(rows[0])), "rows, the plan says"),
    "rows swapped": (lambda rows: rows.reverse(), "the plan says"),
    "another scene": (_set(scene_id="x"), "scene_id is 'x'"),
    "another version": (_set(version="100:b"), "version is"),
    "another part": (_set(part=1), "part is 1"),
    "moved": (_set(row_off=1), "row_off is 1"),
    "another label": (_set(label_uri="/labels/x.tif"), "label_uri is"),
    "moved ground": (_set(transform=[0.5, 0.0, 0.0, 0.0, -0.5, 0.0]), "transform is"),
    "another crs": (_set(crs="EPSG:4326"), "crs is"),
    "valid_px": (lambda rows: rows[0].update(valid_px=rows[0]["valid_px"] + 1), "class_px add up to"),
    "class_px": (lambda rows: rows[0]["class_px"].append(0), "class_px must hold 3"),
    "negative": (lambda rows: rows[0].update(class_px=[-1, rows[0]["valid_px"] + 1, 0]), "class_px add up"),
    "all ok": (_set(status="empty"), "status empty with"),
    "failed with counts": (_set(status="failed", error_kind="decode", valid_px=0), "a failed row has counts"),
    "failed with pixels": (
        _set(status="failed", error_kind="x", class_px=None, confusion=None, compared_px=None, mask=None),
        "valid pixels",
    ),
    "failed without kind": (_set(status="failed", class_px=None, confusion=None, mask=None), "no error_kind"),
    "ok with kind": (_set(error_kind="decode"), "with an error_kind"),
    "compared": (lambda rows: rows[0].update(compared_px=rows[0]["compared_px"] - 1), "confusion adds up"),
    "label_px": (_set(label_px=1), "compared_px is"),
    "label_px too large": (_set(label_px=10**6), "label_px is 1000000"),
    "confusion lost": (_set(confusion=None), "its counts are missing"),
    "confusion cell lost": (lambda rows: rows[0]["confusion"].pop(), "confusion adds up"),
    "confusion cell of nothing": (
        lambda rows: rows[0]["confusion"].append({"label": 0, "predicted": 0, "px": 0}),
        "confusion adds up to -1",
    ),
    "confusion class": (lambda rows: rows[0]["confusion"][0].update(label=7), "names class 7"),
    "no mask": (_set(mask=None), "without a mask"),
    "small mask": (_set(mask=b"\x89PNG\r\n\x1a\n"), "mask"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_not_as_planned_is_damaged(run: MadeRun, name: str) -> None:
    change, reason = BAD_ROWS[name]
    rows = rows_of(run, 0)
    change(rows)
    put_unit(run.storage, run.info, 0, 0, rows)
    assert reason in damage(verify_run(run.storage), run.key(0))


@pytest.mark.parametrize("name", ["label_px", "compared_px"])
def test_label_counts_of_a_scene_without_label_are_damaged(run: MadeRun, name: str) -> None:
    unit = run.num_units[0] - 1
    rows = rows_of(run, unit)
    rows[0][name] = 5
    put_unit(run.storage, run.info, 0, unit, rows)
    assert "label counts where the plan has no label" in damage(verify_run(run.storage), run.key(unit))


def test_a_mask_that_contradicts_its_counts_is_found_by_a_full_check(run: MadeRun) -> None:
    rows = rows_of(run, 0)
    mask = SCENES[0].classes()[: rows[0]["height"], : rows[0]["width"]].copy()
    mask[tuple(np.argwhere(mask == 0)[0])] = 1
    rows[0]["mask"] = encode_mask(mask)
    put_unit(run.storage, run.info, 0, 0, rows)
    assert "pixels a class" in damage(verify_run(run.storage, full=True), run.key(0))


def test_a_mask_with_a_class_that_does_not_exist_is_found_by_a_full_check(run: MadeRun) -> None:
    rows = rows_of(run, 0)
    mask = SCENES[0].classes()[: rows[0]["height"], : rows[0]["width"]].copy()
    mask[-1, -1] = 9
    rows[0]["mask"] = encode_mask(mask)
    put_unit(run.storage, run.info, 0, 0, rows)
    assert "mask holds 9" in damage(verify_run(run.storage, full=True), run.key(0))


@pytest.mark.parametrize(
    "key",
    [
        "masks/part-00000/unit-0000999.parquet",
        "masks/part-00000/unit-000000001.parquet",
        "masks/part-00000/note.txt",
        "masks/part-00007/unit-0000000.parquet",
        "masks/x",
    ],
)
def test_an_object_that_no_plan_names_is_listed_apart(run: MadeRun, key: str) -> None:
    run.storage.put(key, run.storage.read(run.key(0)))
    found = verify_run(run.storage)
    assert found.unplanned.first == [key]
    assert (found.exit_code, found.damaged.count) == (4, 0)


def test_every_finding_is_told_while_the_result_names_the_first_few(tmp_path: Path) -> None:
    run = build_run(str(tmp_path), [[MadeScene(f"s{i:03d}", 130, 130) for i in range(30)]], success=False)
    for unit in range(run.num_units[0]):
        path_of(run, unit).unlink()
    told: list[Finding] = []
    found = verify_run(run.storage, on_finding=told.append)
    assert [finding.key for finding in told] == [run.key(unit) for unit in range(run.num_units[0])]
    assert found.missing.count == len(told) > 20 == len(found.missing.first)


def test_progress_counts_up_to_all_planned_units(run: MadeRun) -> None:
    seen: list[tuple[int, int]] = []
    verify_run(run.storage, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, run.num_units[0]) for i in range(run.num_units[0])]


def test_an_unknown_error_kind_and_status_of_a_newer_version_are_counted(run: MadeRun) -> None:
    rows = rows_of(run, 0)
    failed = {"class_px": None, "confusion": None, "compared_px": None, "valid_px": 0, "mask": None}
    rows[0].update(failed, status="failed", error_kind="meteor")
    rows[1].update(failed, status="deferred")
    put_unit(run.storage, run.info, 0, 0, rows)
    run.storage.put(SUCCESS_KEY, success_totals(run.storage, run.info).to_json())
    found = verify_run(run.storage)
    assert found.exit_code == 0
    assert found.ledger.lines["failed", "meteor"].blocks == 1
    assert found.ledger.lines["deferred", None].blocks == 1
    assert found.ledger.balanced


def test_complete_without_success_is_said_and_no_error(run: MadeRun) -> None:
    run.storage.local_path(SUCCESS_KEY).unlink()  # type: ignore[union-attr]
    found = verify_run(run.storage)
    assert (found.exit_code, found.success, found.complete) == (0, "absent", True)


def test_success_of_a_run_that_has_grown_since_is_outdated_and_no_error(tmp_path: Path) -> None:
    build_run(str(tmp_path), [SCENES])
    run = build_run(str(tmp_path), [SCENES, [MadeScene("new")]], success=False)
    found = verify_run(run.storage)
    assert (found.exit_code, found.success) == (0, "outdated")


@pytest.mark.parametrize("name", ["parts", "units", "rows", "pixels", "bytes"])
def test_success_with_another_number_is_damaged(run: MadeRun, name: str) -> None:
    tree = json.loads(run.storage.read(SUCCESS_KEY))
    run.storage.put(SUCCESS_KEY, json.dumps(tree | {name: tree[name] + 1}).encode())
    found = verify_run(run.storage)
    assert damage(found, SUCCESS_KEY)
    assert found.success == "wrong"


def test_success_that_speaks_of_no_part_is_damaged(run: MadeRun) -> None:
    run.storage.put(SUCCESS_KEY, RunTotals().to_json())
    found = verify_run(run.storage)
    assert damage(found, SUCCESS_KEY)
    assert found.success == "wrong"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"parts": 1}', b'{"parts": "1"}'])
def test_success_that_cannot_be_read_is_damaged(run: MadeRun, data: bytes) -> None:
    run.storage.put(SUCCESS_KEY, data)
    assert "cannot be read" in damage(verify_run(run.storage), SUCCESS_KEY)


def test_success_survives_keys_of_a_newer_version() -> None:
    totals = RunTotals(1, 2, 3, 4, 5)
    assert RunTotals.from_json(json.dumps(json.loads(totals.to_json()) | {"new": 1}).encode()) == totals


def test_scores_of_masks_have_no_masks_of_their_own_and_are_whole(tmp_path: Path) -> None:
    info = replace(make_info(), masks_uri="/runs/other")
    run = build_run(str(tmp_path), [SCENES], info=info)
    for unit in range(run.num_units[0]):
        rows = [row | {"mask": None} for row in rows_of(run, unit)]
        run.storage.put(run.key(unit), encode_unit(rows, mask_schema(info.recipe_key, info.card.classes)))
    run.storage.put(SUCCESS_KEY, success_totals(run.storage, info).to_json())
    assert json.loads(run.storage.read(RUN_KEY))["masks_uri"] == "/runs/other"
    assert verify_run(run.storage, full=True).exit_code == 0


def test_the_table_names_what_is_wrong_and_says_what_to_do(run: MadeRun) -> None:
    path_of(run, 2).unlink()
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render_ledger(verify_run(run.storage), console)
    text = console.export_text()
    assert run.key(2) in text
    assert "missing" in text
    assert "the same command again" in text


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_cell_of_the_table_loses_a_character(run: MadeRun, width: int, terminal: bool) -> None:
    verification = verify_run(run.storage)
    many = {"scenes": 1_234_567, "units": 234_567, "blocks": 34_567_890, "pixels": 3_900_000_400_000}
    verification.ledger.lines["failed", "scene_changed"] = Line(
        "failed", "scene_changed", km2=975_000.125, unknown_px=45_678_900_000, **many
    )
    verification.root = f"s3://bucket/{'long/' * 20}run"
    out = io.StringIO()
    render_ledger(verification, Console(file=out, width=width, force_terminal=terminal, color_system=None))
    lines = out.getvalue().splitlines()
    assert any(verification.root in line for line in lines)
    cells = "1,234,567 234,567 34,567,890 3,900,000.4 975,000.125 45,678.9"
    assert f"failed: scene_changed {cells}".split() in [line.split() for line in lines]
    assert "Mpx of unknown size" in out.getvalue() or (terminal and width < 200)

"""Catalogues in CSV and Parquet: what their columns give a scene, and what is refused."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from rasters import AUTO, noise, write_tiff
from scene_inputs import fault, ids, put, scenes

from segpipe.config.model import InputConfig
from segpipe.masks.plan import PlanScene, encode_part, row_of_scene
from segpipe.rasters.catalogue import list_scenes
from segpipe.rasters.header import inspect_scene


def test_a_csv_catalogue_gives_ids_labels_masks_times_and_typed_columns(root: str) -> None:
    put(root, "img/a.tif", "img/b.tif", "img/c.tif", "truth/a.png", "m/a.tif")
    text = (
        "\ufeffuri,scene_id,label,valid,datetime,city,cloud,flight,day,ok\n"
        'img/c.tif,zz/1,,,,"Kampala, north",0.5,7,2024-05-01,true\n'
        "img/a.tif,aa/2,../cat/truth/a.png,m/a.tif,2024-05-01T10:00:00Z,NA,1,8,2024-05-02,false\n"
        "img/b.tif,mm/3,,,,,,,,\n"
    )
    put(root, "cat.csv", data=text.replace("../cat/", "").encode())
    found = scenes(f"{root}/cat.csv", need_labels=True)
    assert [source.scene_id for source in found] == ["zz/1", "aa/2", "mm/3"]  # the rows' own order
    assert [source.label_uri for source in found] == [None, f"{root}/truth/a.png", None]
    assert [source.valid_uri for source in found] == [None, f"{root}/m/a.tif", None]
    assert [source.datetime for source in found] == [None, "2024-05-01T10:00:00Z", None]
    day = dt.date(2024, 5, 1)
    assert found[0].extra == {"city": "Kampala, north", "cloud": 0.5, "flight": 7, "day": day, "ok": True}
    assert found[1].extra["city"] == "NA"
    assert set(found[2].extra.values()) == {None}


def test_an_empty_cell_says_that_there_is_no_label_and_no_mask_file(root: str) -> None:
    put(root, "a.tif", "a.tif.msk", "a_label.tif")
    put(root, "bare.csv", data=b"uri\na.tif\n")
    put(root, "empty.csv", data=b"uri,label,valid\na.tif,,\n")
    (bare,) = scenes(f"{root}/bare.csv", labels="{parent}/{stem}_label.tif")
    assert (bare.label_uri, bare.valid_uri) == (f"{root}/a_label.tif", f"{root}/a.tif.msk")
    (empty,) = scenes(f"{root}/empty.csv", labels="{parent}/{stem}_label.tif")
    assert (empty.label_uri, empty.valid_uri) == (None, None)


def test_catalogue_types_fit_all_rows_however_late_they_change(root: str) -> None:
    put(root, "a.tif")
    rows = [f"a.tif,s{index:06d},{index},{index}" for index in range(2_000)]
    rows[-1] = "a.tif,last,late,0.5"
    put(root, "cat.csv", data=("uri,scene_id,mixed,number\n" + "\n".join(rows)).encode())
    with list_scenes(
        InputConfig(scenes=(f"{root}/cat.csv",), valid="none"), None, need_labels=False
    ) as found:
        assert found.extra_schema == pa.schema([("mixed", pa.string()), ("number", pa.float64())])
        first = next(found.pages(10))[0][0]
        assert len(found) == 2_000
    assert first.extra == {"mixed": "0", "number": 0.0}


def test_a_csv_of_many_rows_gives_each_in_order_with_quotes_and_blank_lines(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif")
    rows = [f'a.tif,s{index:06d},"said ""{index}"",\nthen left"\r\n\r\n' for index in range(3_000)]
    put(str(tmp_path), "cat.csv", data=("\ufeffuri,scene_id,note\r\n" + "".join(rows)).encode())
    found = scenes(str(tmp_path / "cat.csv"))
    assert [source.scene_id for source in found] == [f"s{index:06d}" for index in range(3_000)]
    assert [source.extra["note"] for source in found] == [f'said "{i}",\nthen left' for i in range(3_000)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc/self/task")
def test_a_damaged_csv_leaves_no_thread_that_could_keep_the_process_from_its_end(tmp_path: Path) -> None:
    rows = [f"a.tif,{index}" if index != 5_000 else "a.tif" for index in range(300_000)]
    put(str(tmp_path), "cat.csv", data=("uri,number\n" + "\n".join(rows)).encode())
    code = (
        "import os, sys, segpipe.rasters.catalogue\n"
        "from scene_inputs import fault\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "print(fault(sys.argv[1]), len(os.listdir('/proc/self/task')) - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cat.csv")]
    folder = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    assert "line 5002: 2 cells are wanted, not 1: a.tif" in done.stdout
    assert done.stdout.split()[-1] == "0"


def test_a_parquet_catalogue_keeps_its_types(tmp_path: Path) -> None:
    put(str(tmp_path), "img/b.tif", "img/a.tif")
    when = dt.datetime(2024, 5, 1, 10, tzinfo=dt.UTC)
    columns = {
        "uri": ["img/b.tif", "img/a.tif"],
        "datetime": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "wkb": [b"\x01\x02", None],
        "tags": [["x", "y"], []],
        "nested": [{"k": 1}, None],
        "seen": pa.array([when, None], pa.timestamp("ns", "UTC")),
        "kind": pa.array(["u", "r"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "cat.parquet")
    second, first = scenes(str(tmp_path / "cat.parquet"))
    assert (second.scene_id, first.scene_id) == ("img/b", "img/a")
    assert second.datetime == "2024-05-01T10:00:00+00:00"
    assert second.extra == {
        "price": Decimal("1.50"),
        "wkb": b"\x01\x02",
        "tags": ["x", "y"],
        "nested": {"k": 1},
        "seen": when,
        "kind": "u",
    }
    assert first.extra["price"] is None


def test_maps_and_times_within_others_are_carried_into_the_plan(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif", "b.tif")
    when = dt.datetime(2024, 5, 1, 10, 30, 0, 250)
    finest = pa.timestamp("ns")
    inner = pa.struct([("t", finest), ("all", pa.list_(finest)), ("$type", pa.string())])
    values = {
        "counts": ([("roof", 3), ("road", None)], pa.map_(pa.string(), pa.int64())),
        "when": ([("start", when)], pa.map_(pa.string(), finest)),
        "inner": ({"t": when, "all": [when, None], "$type": "flight"}, inner),
        "few": ([when], pa.list_(finest, 1)),
        "views": ([when], pa.list_view(finest)),
        "large": ([when], pa.large_list(finest)),
        "hours": ({"at": dt.time(1, 2, 3)}, pa.struct([("at", pa.time64("ns"))])),
    }
    columns = {name: pa.array([value, None], kind) for name, (value, kind) in values.items()}
    columns["kinds"] = pa.ListArray.from_arrays([0, 2, 2], pa.array(["u", "r"]).dictionary_encode())
    columns["code"] = pa.array([b"0123456789abcdef", None], pa.uuid())
    wanted = {name: value for name, (value, _) in values.items()}
    wanted |= {"kinds": ["u", "r"], "code": b"0123456789abcdef"}
    pq.write_table(pa.table({"uri": ["a.tif", "b.tif"]} | columns), tmp_path / "cat.parquet")
    config = InputConfig(scenes=(f"{tmp_path}/cat.parquet",))
    with list_scenes(config, None, need_labels=False) as found:
        planned = [PlanScene(source, None) for page in found.pages() for source, _ in page]
        part = encode_part(planned, found.extra_schema)
    assert planned[0].source.extra == wanted
    first, second = pq.read_table(pa.BufferReader(part)).select(list(wanted)).to_pylist()
    assert first == wanted
    assert set(map(str, second.values())) <= {"None", "[]"}


def test_the_time_of_a_catalogue_goes_before_that_of_the_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = write_tiff(tmp_path / f"{name}.tif", noise(1, 20, 30))
        with rasterio.open(path, "r+") as dataset:
            dataset.update_tags(TIFFTAG_DATETIME="2014:04:01 10:30:00")
    put(str(tmp_path), "cat.csv", data=b"uri,datetime\na.tif,2024-05-01T10:00:00Z\nb.tif,\n")
    planned = [
        row_of_scene(PlanScene(source, inspect_scene(source, 1, AUTO)))["datetime"]
        for source in scenes(str(tmp_path / "cat.csv"))
    ]
    assert planned == ["2024-05-01T10:00:00Z", "2014-04-01T10:30:00"]


def test_inputs_keep_their_order_beside_a_catalogue(root: str) -> None:
    put(root, "z/b.tif", "z/a.tif", "c/y.tif", "c/x.tif")
    put(root, "c/cat.csv", data=b"uri\ny.tif\nx.tif\n")
    assert ids(f"{root}/z", f"{root}/c/cat.csv") == ["a", "b", "y", "x"]


def test_what_a_list_or_a_catalogue_names_in_a_folder_that_is_an_input_too_is_found(root: str) -> None:
    put(root, "a/s0.tif", "a/one.tif", "a/sub/three.tif", "a/truth.bin", "b/two.tif")
    put(root, "a/list.txt", data=b"s0.tif\nsub/three.tif\n")
    put(root, "cat.csv", data=b"uri,label,valid\nb/two.tif,a/truth.bin,a/sub/three.tif\n")
    assert ids(f"{root}/a/list.txt", f"{root}/a") == ["one", "s0", "sub/three"]
    assert ids(f"{root}/a/*.tif", f"{root}/a/list.txt") == ["one", "s0", "sub/three"]
    *_, found = scenes(f"{root}/a/*e.tif", f"{root}/cat.csv", need_labels=True)
    assert (found.label_uri, found.valid_uri) == (f"{root}/a/truth.bin", f"{root}/a/sub/three.tif")
    put(root, "a/list.txt", data=b"s0.tif\ngone.tif\n")
    assert f"no such file: {root}/a/gone.tif" in fault(f"{root}/a", f"{root}/a/list.txt")


def test_an_empty_label_cell_means_no_counts_even_beside_a_template(root: str) -> None:
    put(root, "a.tif", "b.tif", "a.png", "b.png")
    put(root, "cat.csv", data=b"uri,label\na.tif,\nb.tif,a.png\n")
    found = scenes(f"{root}/cat.csv", labels="{stem}.png")
    assert [source.label_uri for source in found] == [None, f"{root}/a.png"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path\na.tif\n", "needs a column 'uri'; found: path"),
        ("uri,uri\na.tif,a.tif\n", "two columns are called 'uri'"),
        ("uri,x\na.tif\n", "cannot be read"),
        ("uri,x\na.tif,1\n,2\n", "row 2 has no uri"),
        ("uri,scene_id\na.tif,\n", "row 1 has no scene_id"),
        ("", "cannot be read"),
        ("uri\n", "no scene there"),
        ("uri\nmissing.tif\n", "no such file"),
        ("uri,scene_id\na.tif,../up\n", "climbs out"),
    ],
)
def test_broken_catalogues_are_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    put(str(tmp_path), "a.tif")
    put(str(tmp_path), "cat.csv", data=text.encode())
    message = fault(str(tmp_path / "cat.csv"))
    assert reason in message
    assert "cat.csv" in message or "missing.tif" in message


def test_a_text_named_parquet_is_refused(tmp_path: Path) -> None:
    put(str(tmp_path), "cat.parquet", data=b"uri\n")
    assert "no valid Parquet file" in fault(str(tmp_path / "cat.parquet"))


def test_catalogues_whose_columns_contradict_are_refused(tmp_path: Path) -> None:
    put(str(tmp_path), "a.tif", "b.tif")
    put(str(tmp_path), "one.csv", data=b"uri,x\na.tif,1\n")
    put(str(tmp_path), "two.csv", data=b"uri,x\nb.tif,word\n")
    assert "do not fit" in fault(str(tmp_path / "one.csv"), str(tmp_path / "two.csv"))

"""What prepare writes: whole, repeatable, resumable data sets, and errors that name the samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from layouts import (
    LOCAL,
    Heard,
    config_of,
    files_of,
    pixels_of,
    prepared,
    rows_of,
    save,
    tar_names,
    write_camvid,
)

from segpipe.cli.main import main
from segpipe.config.card import ClassInfo
from segpipe.config.model import InputConfig, LimitsConfig
from segpipe.config.prepare import PrepareConfig
from segpipe.datasets import images
from segpipe.errors import ConfigError, InputError
from segpipe.masks.codec import decode_mask
from segpipe.pipelines.local import LocalExecutor
from segpipe.pipelines.prepare import run_prepare
from segpipe.rasters.catalogue import list_scenes


def test_statistics_equal_those_of_all_training_pixels(tmp_path: Path) -> None:
    labels = write_camvid(tmp_path / "in")
    tree = prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2).dataset
    rows = rows_of(tmp_path / "out")
    train = np.concatenate(
        [pixels_of(row["image"]).reshape(-1, 3) for row in rows.values() if row["split"] == "train"]
    ).astype(np.float64)
    assert np.allclose(tree["mean"], train.mean(axis=0), rtol=1e-12)
    assert np.allclose(tree["std"], train.std(axis=0), rtol=1e-12)
    every = np.concatenate([label.ravel() for label in labels.values()])
    assert tree["class_px"] == np.bincount(every, minlength=12)[:11].tolist()
    assert tree["ignore_px"] == int((every == 11).sum())
    assert tree["splits"]["val"]["samples"] == 2
    assert sum(tree["class_px"]) + tree["ignore_px"] == tree["valid_px"] == every.size


def test_images_are_passed_through_and_labels_are_our_png(tmp_path: Path) -> None:
    labels = write_camvid(tmp_path / "in")
    prepared("camvid", tmp_path / "in", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert set(rows) == set(labels)
    for name, row in rows.items():
        assert row["image"] == (tmp_path / "in" / f"{name}.png").read_bytes()
        assert np.array_equal(decode_mask(row["label"]), np.where(labels[name] == 11, 255, labels[name]))
        assert row["window"] == {"row_off": 0, "col_off": 0, "height": 12, "width": 16}


def test_an_image_beyond_the_limits_of_a_training_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_camvid(tmp_path / "in")
    monkeypatch.setattr(images, "STORED_LIMITS", LimitsConfig(file_block_bytes=47))  # a row has 48 bytes
    prepared("camvid", tmp_path / "in", tmp_path / "out")
    for name, row in rows_of(tmp_path / "out").items():
        original = (tmp_path / "in" / f"{name}.png").read_bytes()
        assert row["image"] != original
        assert np.array_equal(pixels_of(row["image"]), pixels_of(original))


def test_row_groups_hold_at_most_16_samples_and_shards_one_split(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in", count=23, size=(2, 3))
    tree = prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=20).dataset
    sizes = []
    for shard in tree["shards"]:
        file = pq.ParquetFile(tmp_path / "out" / shard["key"])
        sizes.append([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        assert set(file.read(["split"])["split"].to_pylist()) == {shard["split"]}
    assert sizes == [[16, 4], [1], [2]]


def test_a_shard_is_closed_before_it_passes_its_bytes(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    largest = max(path.stat().st_size for path in (tmp_path / "in/train").iterdir())
    tree = prepared("camvid", tmp_path / "in", tmp_path / "out", shard_bytes=largest + 1).dataset
    assert [shard["samples"] for shard in tree["shards"]] == [1] * 7


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_killed_and_repeated_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    write_camvid(tmp_path / "in")
    options = {"shard_samples": 2, "format": form}
    prepared("camvid", tmp_path / "in", tmp_path / "out", **options)
    whole = files_of(tmp_path / "out")
    assert len(whole) == 5
    (tmp_path / "out/dataset.json").unlink()
    (tmp_path / f"out/shards/part-00001.{form}").unlink()
    again = prepared("camvid", tmp_path / "in", tmp_path / "out", **options)
    assert again.written == 1
    assert files_of(tmp_path / "out") == whole
    assert prepared("camvid", tmp_path / "in", tmp_path / "out", **options).written == 0


def test_nothing_but_dataset_json_is_missing_when_a_worker_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_camvid(tmp_path / "in")
    ended = LocalExecutor.map_ordered

    def stops(self: LocalExecutor, function: object, items: object) -> object:
        for number, value in enumerate(ended(self, function, items)):  # type: ignore[arg-type, var-annotated]
            if number == 2:
                raise KeyboardInterrupt
            yield value

    monkeypatch.setattr(LocalExecutor, "map_ordered", stops)
    with pytest.raises(KeyboardInterrupt):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=1)
    assert not (tmp_path / "out/dataset.json").exists()
    monkeypatch.setattr(LocalExecutor, "map_ordered", ended)
    prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=1)
    prepared("camvid", tmp_path / "in", tmp_path / "straight", shard_samples=1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


@pytest.mark.ray
def test_ray_tasks_write_the_same_bytes_as_threads(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    for name in ("local", "ray"):
        prepared("camvid", tmp_path / "in", tmp_path / name, shard_samples=2, cluster={"executor": name})
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


def test_another_config_in_the_same_output_is_refused(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2)
    before = files_of(tmp_path / "out")
    with pytest.raises(InputError, match="other samples or another config"):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=3)
    (tmp_path / "out/dataset.json").unlink()
    with pytest.raises(InputError, match="not planned"):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=3)
    save(tmp_path / "in/train/im0.png", np.zeros((12, 16, 3), np.uint8))
    with pytest.raises(InputError, match="other samples"):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2)
    del before["dataset.json"]
    assert files_of(tmp_path / "out") == before


def test_another_licence_is_the_same_data_set_with_another_text(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    prepared("camvid", tmp_path / "in", tmp_path / "out", licence="CC0")
    shards = {name: data for name, data in files_of(tmp_path / "out").items() if name != "dataset.json"}
    for given, kept in (("CC BY 4.0", "CC BY 4.0"), (None, "CC BY 4.0"), ("CC0", "CC0")):
        heard = Heard()
        config = config_of("camvid", tmp_path / "in", tmp_path / "out", licence=given)
        done = run_prepare(config, heard)
        assert done.written == 0
        assert done.dataset["licence"] == kept
        assert json.loads((tmp_path / "out/dataset.json").read_text()) == done.dataset
        replaced = "the data set is there already; its licence text is replaced"
        assert heard.lines == [replaced if given else "the data set is there already; nothing to do"]
    prepared("camvid", tmp_path / "in", tmp_path / "straight", licence="CC0")
    whole = files_of(tmp_path / "straight")
    assert files_of(tmp_path / "out") == whole
    assert shards.items() <= whole.items()


def test_predict_reads_prepared_shards_with_their_labels(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    for form in ("parquet", "tar"):
        output = tmp_path / form
        prepared("camvid", tmp_path / "in", output, format=form, shard_samples=3)
        with list_scenes(InputConfig(scenes=(str(output),)), None, need_labels=True) as scenes:
            found = [scene for page in scenes.pages() for scene, _ in page]
        assert len(found) == 7
        assert all(scene.label_uri == scene.uri for scene in found)


def test_tar_keys_end_at_their_first_dot(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in", count=3)
    (tmp_path / "in/train/im0.png").rename(tmp_path / "in/train/a.b.png")
    text = (tmp_path / "in/train.txt").read_text()
    (tmp_path / "in/train.txt").write_text(text.replace("train/im0.png", "train/a.b.png"))
    prepared("camvid", tmp_path / "in", tmp_path / "out", format="tar")
    names = tar_names(tmp_path / "out/shards/part-00000.tar")
    assert names == ["train/a%2Eb.png", "train/a%2Eb.label.png", "train/a%2Eb.json"]


def test_an_image_without_label_is_named_before_anything_is_written(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    (tmp_path / "in/trainannot/im1.png").unlink()
    with pytest.raises(InputError, match=r"no label for 1 listed sample: .*im1\.png"):
        prepared("camvid", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faulty_samples_are_all_named_and_a_repair_goes_on(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    good = (tmp_path / "in/train/im0.png").read_bytes()
    (tmp_path / "in/train/im0.png").write_bytes(good[:-40])
    save(tmp_path / "in/trainannot/im2.png", np.full((12, 16), 77, np.uint8))
    save(tmp_path / "in/trainannot/im3.png", np.zeros((5, 5), np.uint8))
    save(tmp_path / "in/valannot/im5.png", np.zeros((12, 16), np.uint8))
    with pytest.raises(InputError, match="3 samples cannot be used") as caught:
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=1)
    text = str(caught.value)
    assert "train/im0 (decode)" in text
    assert "train/im2 (label_value)" in text
    assert "77" in text
    assert "train/im3 (label_size)" in text
    label = tmp_path / "in/trainannot/im2.png"
    assert f"train/im2 (label_value): the label holds values that no class maps: 77 ({label}); " in text
    assert text.count(". ") == 2
    assert text.count("Repair") == 1
    assert not (tmp_path / "out/dataset.json").exists()
    (tmp_path / "in/train/im0.png").write_bytes(good)
    for number in (2, 3):
        save(tmp_path / f"in/trainannot/im{number}.png", np.zeros((12, 16), np.uint8))
    assert prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=1).written == 3


def test_samples_left_out_after_a_fault_need_the_shards_removed_as_the_message_says(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    save(tmp_path / "in/trainannot/im2.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(InputError, match=rf"remove the shards in {tmp_path}/out first: they are cut anew"):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2)
    listed = (tmp_path / "in/train.txt").read_text().splitlines()
    (tmp_path / "in/train.txt").write_text("\n".join(line for line in listed if "im2" not in line))
    with pytest.raises(InputError, match="the output holds"):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2)
    shutil.rmtree(tmp_path / "out/shards")
    assert prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2).dataset["samples"] == 6


def test_a_shard_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    first = prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2)
    before = files_of(tmp_path / "out")
    (tmp_path / "out/shards/part-00001.parquet").unlink()
    heard = Heard()
    again = run_prepare(config_of("camvid", tmp_path / "in", tmp_path / "out", shard_samples=2), heard)
    assert (again.dataset, again.written) == (first.dataset, 1)
    assert heard.lines == ["the data set is there, but 1 of its shards is gone and is made again"]
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_image_shards_become_a_data_set_as_the_files_they_hold_do(tmp_path: Path, form: str) -> None:
    write_camvid(tmp_path / "in")
    first = prepared("camvid", tmp_path / "in", tmp_path / "shards", format=form).dataset
    classes = tuple(ClassInfo.model_validate(item) for item in first["classes"])
    tree = prepared("folder", tmp_path / "shards/shards", tmp_path / "out", classes=classes).dataset
    assert tree["samples"] == first["samples"]
    assert tree["class_px"] == first["class_px"]


@pytest.mark.parametrize("shard_samples", [1, 2, 100])
@pytest.mark.parametrize("odd", ["im0", "im3"])
def test_an_image_of_another_kind_is_the_one_that_is_named(
    tmp_path: Path, odd: str, shard_samples: int
) -> None:
    write_camvid(tmp_path / "in")
    save(tmp_path / f"in/train/{odd}.png", np.zeros((12, 16), np.uint8))
    text = rf"1 sample cannot be used: train/{odd} \(bands\): 1 band of uint8, most others have 3 bands"
    with pytest.raises(InputError, match=text):
        prepared("camvid", tmp_path / "in", tmp_path / "out", shard_samples=shard_samples)
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_class_that_never_occurs_is_said_and_kept(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in")
    for path in (tmp_path / "in").glob("*annot/*.png"):
        label = pixels_of(path.read_bytes())
        save(path, np.where(label == 6, 0, label).astype(np.uint8))
    heard = Heard()
    done = run_prepare(config_of("camvid", tmp_path / "in", tmp_path / "out"), heard)
    assert done.dataset["absent_classes"] == ["sign"]
    assert heard.warnings == ["classes that never occur in the labels: sign"]


def test_the_command_prints_json_and_a_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_camvid(tmp_path / "in")
    words = ["prepare", "camvid", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--executor", "local"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 5, "val": 2}
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--json", "--licence", "CC0"])
    tree = json.loads(capsys.readouterr().out)
    assert tree["licence"] == "CC0"
    assert tree["samples"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "shard_sample=3"], "shard_samples"),
        (["--set", "cluster.workers=3"], "cluster.workers"),
        (["--set", "cluster.threads_per_worker=3"], "cluster.threads_per_worker"),
        (["--labels", "{stem}.png"], "brings its own"),
        (["--split", "val"], "NAME=FRACTION"),
        (["--format", "zip"], "format"),
    ],
)
def test_wrong_options_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_camvid(tmp_path / "in", count=3)
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "camvid", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_is_needed(tmp_path: Path) -> None:
    write_camvid(tmp_path / "in", count=3)
    config = config_of("camvid", tmp_path / "in", tmp_path / "out").model_copy(update={"output": None})
    with pytest.raises(ConfigError, match="--output"):
        run_prepare(config, Heard())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"scene_px": 100}}, "the limit is 100"),
        ({"labels": "{parent}/{stem}_no.png"}, "labels: no label for 2 of 2 scenes"),
        ({"labels": "{nothing}.png"}, "labels: the template"),
        ({"label_map": {"roof": 1}}, "label_map: 'roof' is neither a whole number nor a colour"),
        ({}, "the label holds values that no class maps: 7"),
        ({"sources": ("nowhere",)}, "inputs: no such file"),
    ],
)
def test_no_message_speaks_of_keys_or_of_a_model_that_prepare_has_not(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"in/{name}.jpg", np.zeros((12, 16, 3), np.uint8))
        save(tmp_path / f"in/{name}_label.png", np.full((12, 16), 7, np.uint8))
    wanted = {"sources": (f"{tmp_path}/in/*.jpg",), "labels": "{parent}/{stem}_label.png", **options}
    classes = ({"name": "land", "color": (0, 128, 0)}, {"name": "house", "color": (200, 10, 10)})
    config = PrepareConfig.model_validate(
        {"layout": "folder", "output": str(tmp_path / "out"), "classes": classes, "cluster": LOCAL, **wanted}
    )
    with pytest.raises(InputError) as caught:
        run_prepare(config, Heard())
    assert message in str(caught.value)
    assert "input." not in str(caught.value)
    assert "model" not in str(caught.value)

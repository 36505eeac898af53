"""The model file: a round trip keeps everything, anything else is refused in one clear sentence."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import segpipe.demo
import segpipe.models
from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.prepare import load_prepare
from segpipe.config.train import load_train
from segpipe.errors import InputError, ObjectMissing
from segpipe.models.blocks import SegmentationModel
from segpipe.models.families import FAMILIES, build_of
from segpipe.models.file import encode_model, load_model, save_model
from segpipe.models.header import MAX_HEADER_BYTES, read_card_bytes


def card_of(family: str = "unet", bands: int = 3, classes: int = 2, **options: Any) -> ModelCard:
    if family == "unet" and not options:
        options = {"width": 4, "depth": 2}
    return ModelCard(
        family=family,
        options=options,
        bands=tuple(f"b{index}" for index in range(bands)),
        mean=(100.0,) * bands,
        std=(50.0,) * bands,
        pixel_m=0.3,
        classes=tuple(ClassInfo(name=f"c{index}", color=(index, 0, 255)) for index in range(classes)),
        training={"place": "Kampala, 0.3 m, 日本", "iou": 0.5},
    )


def network_of(card: ModelCard) -> SegmentationModel:
    torch.manual_seed(11)
    return build_of(card)


def read_card(path: str) -> ModelCard:
    return read_card_bytes(Path(path).read_bytes(), path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, network_of(card_of()), card_of())
    return path


def repacked(data: bytes, **metadata: str) -> bytes:
    """The same tensors under other metadata."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"].update(metadata)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_keeps_weights_and_card(family: str, tmp_path: Path) -> None:
    card = card_of(family, bands=4, classes=5)
    model, path = network_of(card), tmp_path / "model.safetensors"
    save_model(path, model, card)
    loaded, loaded_card = load_model(str(path))
    assert loaded_card == card
    assert not loaded.training
    weights = model.state_dict()
    assert list(weights) == list(loaded.state_dict())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    with torch.inference_mode():
        x = torch.randn(1, 4, 33, 35)
        assert torch.equal(loaded(x), model.eval()(x))


def test_same_weights_and_card_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    model = network_of(card_of()).to(memory_format=torch.channels_last)
    save_model(again, model, card_of())
    assert again.read_bytes() == saved.read_bytes() == encode_model(model, card_of())


def test_other_weights_give_other_bytes(saved: Path, tmp_path: Path) -> None:
    other, model = tmp_path / "other.safetensors", network_of(card_of())
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    save_model(other, model, card_of())
    assert other.read_bytes() != saved.read_bytes()


def test_safetensors_itself_opens_the_file(saved: Path) -> None:
    with safetensors.safe_open(str(saved), "pt") as opened:
        assert set(opened.metadata()) == {"segpipe", "segpipe.format"}
        assert set(opened.keys()) == set(network_of(card_of()).state_dict())


def test_half_precision_weights_load_as_exact_float32(saved: Path) -> None:
    halves = {
        k: v.half() if v.is_floating_point() else v for k, v in network_of(card_of()).state_dict().items()
    }
    metadata = {"segpipe": card_of().model_dump_json(), "segpipe.format": "1"}
    saved.write_bytes(safetensors.torch.save(halves, metadata))
    loaded, _ = load_model(str(saved))
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, halves[name].to(tensor.dtype))


def test_saving_and_loading_leave_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(4)
    wanted = torch.rand(3)
    model = network_of(card_of())
    torch.manual_seed(4)
    save_model(saved, model, card_of())
    load_model(str(saved))
    assert torch.equal(torch.rand(3), wanted)


def test_a_card_is_read_without_torch(saved: Path) -> None:
    code = (
        "import sys; from segpipe.models.header import read_card_bytes\n"
        f"assert read_card_bytes(open({str(saved)!r}, 'rb').read()).family == 'unet'\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_offers_the_two_functions_that_users_need() -> None:
    assert segpipe.models.load_model is load_model
    assert segpipe.models.save_model is save_model
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        segpipe.models.load_modle  # noqa: B018


def test_saving_weights_that_are_not_the_cards_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not fit the model card"):
        save_model(tmp_path / "m.safetensors", network_of(card_of(classes=3)), card_of(classes=2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"s3://b/m\.safetensors: the weights do not fit the model card"):
        encode_model(network_of(card_of(classes=3)), card_of(classes=2), "s3://b/m.safetensors")


def test_saving_replaces_a_file_and_leaves_no_stray(saved: Path) -> None:
    save_model(saved, network_of(card_of(classes=4)), card_of(classes=4))
    assert read_card(str(saved)).num_classes == 4
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing):
        load_model(str(tmp_path / "none.safetensors"))


def torch_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch_checkpoint(), "a zip file, as torch.save writes it"),
        (pickle.dumps({"w": 1}), "a pickle file"),
        (pickle.dumps({"w": [0] * 9}, protocol=0), "not a safetensors file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
        (b"\x1f\x8b" + bytes(64), "a gzip file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"", "only 0 bytes"),
        (b"\x08\x00\x00", "only 3 bytes"),
        (b"<html><body>404</body></html>", "not a safetensors file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((5000).to_bytes(8, "little") + b"{}", "cut off within its header"),
        ((4).to_bytes(8, "little") + b"{{}}", "header is damaged"),
        ((8).to_bytes(8, "little") + b'{"a":[]}', "header is damaged"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "header is damaged"),
        pytest.param(
            (200_006).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "header is damaged",
            id="nested",
        ),
        ((4).to_bytes(8, "little") + b"{  }", "without segpipe's model card"),
        ((21).to_bytes(8, "little") + b'{"__metadata__":"no"}', "without segpipe's model card"),
        (safetensors.torch.save({"w": torch.zeros(2)}, {"format": "pt"}), "without segpipe's model card"),
    ],
)
def test_foreign_and_damaged_files_are_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for read in (read_card, load_model):
        with pytest.raises(InputError) as caught:
            read(str(path))
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_ever_unpickled(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(InputError, match="safetensors"):
        load_model(str(path))


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 100, -1])
def test_a_cut_file_is_refused_wherever_it_is_cut(kept: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    for read in (read_card, load_model):
        with pytest.raises(InputError, match=r"cut off|has only|not a safetensors"):
            read(str(saved))


def test_bytes_after_the_weights_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(InputError, match="extra bytes"):
        load_model(str(saved))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"segpipe.format": "2"}, "format 2, newer than 1. Update segpipe"),
        ({"segpipe.format": "9" * 5000}, "not a number"),
        ({"segpipe.format": "x"}, "format is 'x', not a number"),
        ({"segpipe": "{"}, "the model card is not valid"),
        ({"segpipe": "{}"}, "the model card is not valid: family"),
        (
            {"segpipe": card_of().model_dump_json().replace("100.0", "NaN", 1)},
            "the model card is not valid: mean.0: Input should be a finite number",
        ),
        ({"segpipe": card_of().model_dump_json().replace("50.0", "0.0", 1)}, "std must be positive"),
        ({"segpipe": card_of(classes=3).model_dump_json()}, "the weights do not fit the model card: head"),
        (
            {"segpipe": card_of(width=4, depth=3).model_dump_json()},
            "the weights do not fit the model card: missing",
        ),
        ({"segpipe": card_of(width=4, depth=1).model_dump_json()}, "unexpected"),
        ({"segpipe": card_of(widht=4).model_dump_json()}, "Did you mean 'width'"),
        ({"segpipe": card_of("unet2", width=4).model_dump_json()}, "Did you mean 'unet'"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(metadata: dict[str, str], message: str, saved: Path) -> None:
    saved.write_bytes(repacked(saved.read_bytes(), **metadata))
    with pytest.raises(InputError) as caught:
        load_model(str(saved))
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)


def test_integer_weights_in_place_of_floats_are_refused(saved: Path) -> None:
    integers = {name: tensor.long() for name, tensor in network_of(card_of()).state_dict().items()}
    metadata = {"segpipe": card_of().model_dump_json(), "segpipe.format": "1"}
    saved.write_bytes(safetensors.torch.save(integers, metadata))
    with pytest.raises(InputError, match=r"is torch\.int64, not torch\.float32"):
        load_model(str(saved))


def test_fields_that_a_later_card_adds_are_passed_over(saved: Path) -> None:
    later = {**json.loads(card_of().model_dump_json()), "added_later": 1}
    data = repacked(saved.read_bytes(), segpipe=json.dumps(later))
    assert read_card_bytes(data) == card_of()


def test_the_demo_shows_the_scenes_that_its_model_was_not_trained_on() -> None:
    folder = Path(segpipe.demo.__file__).parent / "data"
    model, card = load_model(str(folder / "model.safetensors"))
    shown = sorted(path.stem for path in (folder / "scenes").iterdir())
    assert shown == sorted(path.stem for path in (folder / "labels").iterdir())
    text = (Path(__file__).parents[2] / "jobs/configs/demo.yaml").read_text()
    trained, globs = load_train(text, {}, (), "demo"), load_prepare(text, {}, (), "demo").split.globs
    for scene in shown:  # the first split whose glob fits has the scene
        split = next(name for name, some in globs.items() if any(fnmatch(scene, glob) for glob in some))
        assert split in trained.validation.splits
        assert split not in trained.data.train_splits
    assert sum(card.training["samples"][name] for name in trained.validation.splits) == len(shown)
    assert (folder / "model.safetensors").stat().st_size < 8e6
    with torch.inference_mode():
        assert model(torch.zeros(1, len(card.bands), 64, 64)).shape == (1, card.num_classes, 64, 64)

"""The pretrained start from torchvision's files: every kind lands on the right names, bit by bit."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from weights import (
    Folder,
    assert_same,
    card_of,
    network_of,
    random_state,
    safe_bytes,
    segmentation_state,
    started,
    torch_bytes,
    torchvision_state,
    untouched,
)

from segpipe.errors import InputError
from segpipe.models.families import FAMILIES, build
from segpipe.models.file import empty_model
from segpipe.models.pretrained import load_start
from segpipe.models.state_keys import KEY_MAPS, LAST_LAYERS


def test_every_family_has_its_key_maps_and_its_last_layer() -> None:
    assert set(KEY_MAPS) == set(LAST_LAYERS) == set(FAMILIES)
    for family, last in LAST_LAYERS.items():
        model = empty_model(card_of(family, classes=("a", "b", "c", "d", "e")), family)
        assert all(model.get_submodule(name).weight.shape[0] == 5 for name in last), family


class TestTorchvision:
    @pytest.mark.parametrize("family", ["fcn_resnet50", "deeplabv3_resnet50"])
    def test_a_segmentation_network_fills_all_and_its_auxiliary_head_is_left_out(
        self, family: str, folder: Folder
    ) -> None:
        state = segmentation_state(family, num_classes=3, aux_loss=True)
        ours, report = started(folder, torch_bytes(state), card_of(family))
        assert_same(ours, {name: t for name, t in state.items() if not name.startswith("aux_classifier.")})
        assert report.loaded == len(ours)
        assert (report.dropped, report.fresh) == (("aux_classifier",), ())
        assert report.adapted == ("last layer: copied, its 3 classes in the file's order",)
        assert report.kind.startswith("torchvision ")

    def test_lraspp_with_another_class_count_starts_both_last_layers_anew(self, folder: Folder) -> None:
        card = card_of("lraspp_mobilenet_v3_large")
        state = segmentation_state(card.family, num_classes=21)
        ours, report = started(folder, torch_bytes(state), card)
        last = {
            f"classifier.{level}_classifier.{kind}"
            for level in ("low", "high")
            for kind in ("weight", "bias")
        }
        assert set(report.fresh) == last
        assert_same(ours, {name: tensor for name, tensor in state.items() if name not in last})
        assert_same(ours, {name: tensor for name, tensor in untouched(card).items() if name in last})
        assert report.adapted == ("last layer: 21 classes to 3: starts anew",)
        assert report.is_backbone("backbone.0.0.weight")
        assert not any(report.is_backbone(name) for name in last)

    @pytest.mark.parametrize("family", ["fcn_resnet50", "deeplabv3_resnet50"])
    def test_a_resnet50_fills_the_backbone(self, family: str, folder: Folder) -> None:
        state = torchvision_state("resnet50")
        ours, report = started(folder, torch_bytes(state), card_of(family))
        body = {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}
        assert_same(ours, body)
        assert report.loaded == len(body)
        assert (report.kind, report.dropped) == ("torchvision ResNet-50 backbone", ("fc",))
        assert all(name.startswith("classifier.") for name in report.fresh)
        assert {name for name in ours if report.is_backbone(name)} == {
            name for name in body if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        }

    def test_an_fcn_gives_its_backbone_to_a_deeplab(self, folder: Folder) -> None:
        state = segmentation_state("fcn_resnet50", num_classes=3)
        card = card_of("deeplabv3_resnet50")
        ours, report = started(folder, torch_bytes(state), card)
        assert_same(ours, {name: tensor for name, tensor in state.items() if name.startswith("backbone.")})
        assert report.dropped == ("classifier",)
        assert "classifier.4.weight" in report.fresh
        assert "another head" in report.kind

    def test_a_mobilenet_v3_fills_the_backbone_of_lraspp(self, folder: Folder) -> None:
        state = torchvision_state("mobilenet_v3_large")
        ours, report = started(folder, torch_bytes(state), card_of("lraspp_mobilenet_v3_large"))
        body = {
            name.replace("features.", "backbone.", 1): tensor
            for name, tensor in state.items()
            if name.startswith("features.")
        }
        assert_same(ours, body)
        assert report.loaded == len(body)
        assert report.dropped == ("classifier",)

    def test_a_mobilenet_v2_fills_the_encoder_of_the_unet_up_to_its_cut(self, folder: Folder) -> None:
        state = torchvision_state("mobilenet_v2")
        card = card_of("unet_mobilenet_v2")
        ours, report = started(folder, torch_bytes(state), card)
        body = {name: tensor for name, tensor in state.items() if name in ours}
        assert {name.split(".")[1] for name in body} == {str(index) for index in range(17)}
        assert_same(ours, body)
        assert report.dropped == ("features.17", "features.18", "classifier")
        assert_same(ours, {n: t for n, t in untouched(card).items() if not n.startswith("features.")})

    def test_files_from_before_batch_norm_counted_batches_load_too(self, folder: Folder) -> None:
        state = {n: t for n, t in torchvision_state("mobilenet_v2").items() if "num_batches" not in n}
        ours, _ = started(folder, torch_bytes(state), card_of("unet_mobilenet_v2"))
        assert torch.equal(ours["features.3.conv.2.weight"], state["features.3.conv.2.weight"])
        assert int(ours["features.0.1.num_batches_tracked"]) == 0

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("resnet101", "a ResNet of more than 50 layers"),  # has every name of a ResNet-50
            ("resnet18", "a ResNet of 18 or 34 layers"),
            ("wide_resnet50_2", r"layer1\.0\.conv1\.weight is"),  # has its names in other shapes
            ("mobilenet_v3_small", "a MobileNetV3"),
        ],
    )
    def test_a_relative_of_the_backbone_is_refused_by_name(
        self, name: str, words: str, folder: Folder
    ) -> None:
        card = card_of("lraspp_mobilenet_v3_large" if "mobile" in name else "fcn_resnet50")
        with pytest.raises(InputError, match=f"do not fit {card.family}.*{words}"):
            started(folder, torch_bytes(torchvision_state(name)), card)


class TestContainers:
    STATE = random_state(build("unet", bands=3, classes=3, width=4, depth=2))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(safe_bytes(STATE), id="safetensors"),
            pytest.param(torch_bytes(STATE), id="zip"),
            pytest.param(torch_bytes(STATE, _use_new_zipfile_serialization=False), id="legacy"),
            pytest.param(torch_bytes({"state_dict": STATE, "epoch": 3}), id="state_dict"),
            pytest.param(
                torch_bytes({n: nn.Parameter(t, t.is_floating_point()) for n, t in STATE.items()}),
                id="parameters",
            ),
            pytest.param(torch_bytes({"model": STATE, "optimizer": {"lr": [1.0]}}), id="model"),
            pytest.param(torch_bytes({"model_state_dict": STATE}), id="model_state_dict"),
            pytest.param(torch_bytes({f"module.{n}": t for n, t in STATE.items()}), id="module"),
            pytest.param(torch_bytes({"model": {f"module.{n}": t for n, t in STATE.items()}}), id="both"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["pth", "safetensors", "txt"])
    def test_content_decides_whatever_the_name(self, data: bytes, suffix: str, folder: Folder) -> None:
        card = card_of("unet")
        model = network_of(card)
        report = load_start(model, card, folder.start(data, f"w.{suffix}"))
        assert_same(model.state_dict(), self.STATE)
        assert report.kind == "state dict of the same network"
        assert report.sha256 == hashlib.sha256(data).hexdigest()
        assert report.loaded == len(self.STATE)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions_become_exact_float32(self, dtype: torch.dtype, folder: Folder) -> None:
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.STATE.items()}
        ours, _ = started(folder, torch_bytes(state), card_of("unet"))
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in ours.values())
        assert_same(ours, {name: tensor.to(ours[name].dtype) for name, tensor in state.items()})

    @pytest.mark.parametrize("old", [False, True])
    def test_a_pickle_with_code_is_refused_and_nothing_runs(
        self, old: bool, folder: Folder, tmp_path: Path
    ) -> None:
        marker = tmp_path / "ran"

        class Trap:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.mkdir, (str(marker),)

        data = torch_bytes({"a": Trap()}, _use_new_zipfile_serialization=not old)
        with pytest.raises(
            InputError, match=r"refused: it asks for posix.mkdir, and opening it could run code"
        ):
            started(folder, data, card_of("unet"))
        with pytest.raises(InputError, match="refused"):
            started(folder, pickle.dumps(Trap()), card_of("unet"))
        assert not marker.exists()
        pickle.loads(pickle.dumps(Trap()))  # noqa: S301 - the trap does work
        assert marker.exists()

    def test_a_whole_pickled_module_is_refused(self, folder: Folder) -> None:
        with pytest.raises(InputError, match=r"Conv2d.*save the tensors alone"):
            started(folder, torch_bytes(nn.Conv2d(1, 1, 1)), card_of("unet"))

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
            (b"\n<html lang='en'>", "a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
            (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
            (b"just some text in a file", "nor is it a torch file"),
            (torch_bytes(STATE)[:-100], "damaged"),
            (torch_bytes(STATE, _use_new_zipfile_serialization=False)[:-10], "damaged"),
            (b"\x80", "damaged"),
            (safe_bytes(STATE)[:-1], "cut off"),
            (safetensors.torch.save({}), "holds no weights"),
            (torch_bytes([1, 2]), "holds list, not a state dict"),
            (torch_bytes({"epoch": 3, "lr": 0.1}), "a dict of 'epoch', 'lr'"),
            (torch_bytes({}), "a dict of nothing"),
        ],
    )
    def test_what_holds_no_weights_is_named(self, data: bytes, words: str, folder: Folder) -> None:
        with pytest.raises(InputError, match=words):
            started(folder, data, card_of("unet"))

    def test_a_zip_of_something_else_is_refused(self, folder: Folder) -> None:
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(InputError, match="no torch file"):
            started(folder, sink.getvalue(), card_of("unet"))

    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            (torch.full((3,), float("nan")), "not finite"),
            (torch.eye(3).to_sparse(), "sparse"),
            (torch.zeros(3, dtype=torch.complex64), "complex"),
            (torch.zeros(3, dtype=torch.int64), "head.bias is torch.int64"),
        ],
    )
    def test_a_tensor_that_is_no_plain_weight_is_named(
        self, tensor: Tensor, words: str, folder: Folder
    ) -> None:
        with pytest.raises(InputError, match=rf"head\.bias.*{words}|{words}"):
            started(folder, torch_bytes(self.STATE | {"head.bias": tensor}), card_of("unet"))


def test_the_report_tells_a_person_what_was_done(folder: Folder) -> None:
    data = torch_bytes(torchvision_state("mobilenet_v2"))
    card = card_of("unet_mobilenet_v2", bands=("red", "green", "blue", "nir"))
    _, report = started(folder, data, card)
    lines = report.lines()
    assert lines == [
        f"start: torchvision MobileNetV2 backbone, {folder.root}/weights",
        f"  sha256 {hashlib.sha256(data).hexdigest()}",
        f"  {report.loaded} tensors from the file",
        "  first layer: 3 bands to 4: red, green, blue by name; nir from the mean of the file's bands",
        "  left out of the file: features.17, features.18, classifier",
        f"  random start: {len(report.fresh)} parameters of ups, head",
    ]
    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301

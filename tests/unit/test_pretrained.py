"""The pretrained start: every kind of file lands on the right names, bit by bit; the rest is refused."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import socket
import threading
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from segpipe.config.card import ClassInfo, ModelCard
from segpipe.config.train import InitConfig
from segpipe.errors import InputError, StorageRefused
from segpipe.models.adapt import plan_bands
from segpipe.models.families import FAMILIES, build
from segpipe.models.file import _encode, _NoStart, empty_model
from segpipe.models.layouts import LAST_LAYERS, LAYOUTS
from segpipe.models.pretrained import StartReport, load_start
from segpipe.storage import open_object

RGB = ("red", "green", "blue")
ABC = ("a", "b", "c")


def card_of(
    family: str, bands: tuple[str, ...] = RGB, classes: tuple[str, ...] = ABC, **options: Any
) -> ModelCard:
    if family == "unet" and not options:
        options = {"width": 4, "depth": 2}
    return ModelCard(
        family=family,
        options=options,
        bands=bands,
        mean=(0.0,) * len(bands),
        std=(1.0,) * len(bands),
        classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in classes),
    )


def network_of(card: ModelCard) -> nn.Module:
    if "resnet50" in card.family:  # its random start takes long and no test asks for it
        blank = empty_model(card, "test").to_empty(device="cpu")
        for tensor in blank.state_dict().values():
            tensor.zero_()
        return blank
    return build(card.family, bands=len(card.bands), classes=card.num_classes, **card.options)


def random_state(model: nn.Module) -> dict[str, Tensor]:
    """Random values for all names of a network that may have no storage.

    All are views of one small storage, at different places: files of large networks stay small.
    """
    base = torch.rand(60_000, generator=torch.Generator().manual_seed(5))
    state = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            state[name] = base.as_strided(tensor.shape, (13, 5, 3, 1)[: tensor.ndim], 17 * index)
        else:
            state[name] = torch.tensor(7)
    return state


def safe_bytes(state: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in state.items()})


def torchvision_state(name: str, **options: Any) -> dict[str, Tensor]:
    """A stand-in for a published file: torchvision's names and shapes, random values."""
    from torchvision.models import get_model

    with torch.device("meta"), _NoStart():
        model = get_model(name, weights=None, **options)
    return random_state(model)


def segmentation_state(name: str, **options: Any) -> dict[str, Tensor]:
    return torchvision_state(name, weights_backbone=None, **options)


def torch_bytes(content: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink, **options)
    return sink.getvalue()


class Folder:
    """A store in memory that takes bytes and gives the config that starts from them."""

    def __init__(self) -> None:
        self.root = f"memory://{uuid.uuid4().hex}"

    def start(self, data: bytes, name: str = "weights", sha256: str | None = None) -> InitConfig:
        uri = f"{self.root}/{name}"
        storage, key = open_object(uri)
        storage.put(key, data)
        return InitConfig(weights=uri, sha256=sha256)


@pytest.fixture
def folder() -> Iterator[Folder]:
    made = Folder()
    yield made
    memory = fsspec.filesystem("memory")
    path = "/" + made.root.removeprefix("memory://")
    if memory.exists(path):
        memory.rm(path, recursive=True)


def started(folder: Folder, data: bytes, card: ModelCard) -> tuple[dict[str, Tensor], StartReport]:
    """The network's values after the start, and the report."""
    torch.manual_seed(3)
    model = network_of(card)
    report = load_start(model, card, folder.start(data))
    return model.state_dict(), report


def untouched(card: ModelCard) -> dict[str, Tensor]:
    """The values that ``started`` begins with."""
    torch.manual_seed(3)
    return network_of(card).state_dict()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert theirs
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_every_family_has_its_layouts_and_its_last_layer() -> None:
    assert set(LAYOUTS) == set(LAST_LAYERS) == set(FAMILIES)
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


class TestOwnFiles:
    def file_of(self, card: ModelCard) -> tuple[bytes, dict[str, Tensor]]:
        state = random_state(empty_model(card, "test"))
        return _encode({name: tensor.clone().contiguous() for name, tensor in state.items()}, card), state

    def test_the_same_network_is_copied_whole(self, folder: Folder) -> None:
        data, state = self.file_of(card_of("unet"))
        ours, report = started(folder, data, card_of("unet"))
        assert_same(ours, state)
        assert report.kind == "model file of segpipe"
        assert (report.adapted, report.fresh, report.dropped) == ((), (), ())
        assert all(report.is_backbone(name) for name, _ in network_of(card_of("unet")).named_parameters())

    def test_rows_of_classes_go_by_name_and_new_classes_start_anew(self, folder: Folder) -> None:
        data, state = self.file_of(card_of("unet", classes=("a", "b", "c")))
        card = card_of("unet", classes=("c", "new", "a", "other"))
        ours, report = started(folder, data, card)
        before = untouched(card)
        for name in ("head.weight", "head.bias"):
            assert torch.equal(ours[name][0], state[name][2])
            assert torch.equal(ours[name][2], state[name][0])
            assert torch.equal(ours[name][[1, 3]], before[name][[1, 3]])
            assert not report.is_backbone(name)
            assert name not in report.fresh
        assert report.adapted == ("last layer: 3 classes to 4: c, a by name; new, other start anew",)

    def test_the_same_classes_in_another_order_are_put_in_order(self, folder: Folder) -> None:
        data, state = self.file_of(card_of("unet", classes=("a", "b", "c")))
        ours, report = started(folder, data, card_of("unet", classes=("b", "c", "a")))
        assert torch.equal(ours["head.weight"], state["head.weight"][[1, 2, 0]])
        assert report.is_backbone("head.weight")

    def test_classes_that_share_no_name_start_anew_though_their_count_is_equal(self, folder: Folder) -> None:
        data, _ = self.file_of(card_of("unet", classes=("a", "b", "c")))
        card = card_of("unet", classes=("x", "y", "z"))
        ours, report = started(folder, data, card)
        assert report.fresh == ("head.weight", "head.bias")
        assert torch.equal(ours["head.weight"], untouched(card)["head.weight"])

    def test_bands_of_one_name_are_copied_and_others_get_the_mean(self, folder: Folder) -> None:
        data, state = self.file_of(card_of("unet", bands=RGB))
        ours, report = started(folder, data, card_of("unet", bands=("nir", "blue", "green", "red")))
        theirs, mine = state["downs.0.0.0.weight"], ours["downs.0.0.0.weight"]
        assert torch.equal(mine[:, 1:], theirs[:, [2, 1, 0]])
        torch.testing.assert_close(mine[:, 0], theirs.mean(dim=1))
        assert report.adapted == (
            "first layer: 3 bands to 4: blue, green, red by name; nir from the mean of the file's bands",
        )
        assert report.is_backbone("downs.0.0.0.weight")

    def test_a_linear_pixel_classifier_adapts_its_one_layer_on_both_sides(self, folder: Folder) -> None:
        data, state = self.file_of(card_of("pixel", classes=("a", "b"), width=0))
        card = card_of("pixel", bands=("blue", "red"), classes=("b", "new"), width=0)
        ours, report = started(folder, data, card)
        assert torch.equal(ours["head.weight"][0], state["head.weight"][1, [2, 0]])
        assert len(report.adapted) == 2

    def test_weights_that_are_not_finite_are_refused_by_name(self, folder: Folder) -> None:
        card = card_of("unet")
        state = self.file_of(card)[1]
        state["ups.0.raise_2x.bias"] = torch.full_like(state["ups.0.raise_2x.bias"], float("inf"))
        with pytest.raises(InputError, match=r"ups\.0\.raise_2x\.bias holds values that are not finite"):
            started(folder, _encode({n: t.clone().contiguous() for n, t in state.items()}, card), card)

    def test_nothing_but_fresh_rows_is_refused(self, folder: Folder) -> None:
        data, _ = self.file_of(card_of("pixel", classes=("a", "b"), width=0))
        with pytest.raises(InputError, match="no class has the same name"):
            started(folder, data, card_of("pixel", classes=("x", "y"), width=0))

    def test_another_family_is_refused_and_both_are_named(self, folder: Folder) -> None:
        data, _ = self.file_of(card_of("unet"))
        with pytest.raises(InputError, match="family unet, the network is unet_mobilenet_v2"):
            started(folder, data, card_of("unet_mobilenet_v2"))

    @pytest.mark.parametrize("options", [{"width": 8, "depth": 2}, {"width": 4, "depth": 3}])
    def test_other_options_are_refused_and_both_are_named(self, options: Any, folder: Folder) -> None:
        data, _ = self.file_of(card_of("unet"))
        with pytest.raises(InputError, match=r"'width': 4, 'depth': 2.*model\.options") as caught:
            started(folder, data, card_of("unet", **options))
        assert str(options) in str(caught.value)


class TestBands:
    @pytest.mark.parametrize("bands", [1, 4, 13])
    @pytest.mark.parametrize("family", ["unet", "unet_mobilenet_v2", "lraspp_mobilenet_v3_large"])
    def test_another_band_count_keeps_the_response_to_a_grey_image(
        self, bands: int, family: str, folder: Folder
    ) -> None:
        source = card_of(family)
        state = random_state(empty_model(source, "test"))
        card = card_of(family, bands=tuple(f"band_{index}" for index in range(bands)))
        torch.manual_seed(1)
        model = network_of(card)
        report = load_start(model, card, folder.start(torch_bytes(state)))
        name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        grey = torch.rand(1, 1, 16, 16)
        with torch.inference_mode():
            ours = first(grey.expand(-1, bands, -1, -1))
            theirs = nn.functional.conv2d(
                grey.expand(-1, 3, -1, -1), state[f"{name}.weight"], None, first.stride, first.padding
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert report.adapted[0].startswith(f"first layer: 3 bands to {bands}:")

    def test_blue_green_red_get_their_own_weights_of_an_rgb_backbone(self, folder: Folder) -> None:
        state = torchvision_state("mobilenet_v2")
        card = card_of("unet_mobilenet_v2", bands=("blue", "green", "red"))
        ours, report = started(folder, torch_bytes(state), card)
        assert torch.equal(ours["features.0.0.weight"], state["features.0.0.weight"][:, [2, 1, 0]])
        assert report.adapted == ("first layer: 3 bands to 3: blue, green, red by name",)

    def test_an_equal_count_without_a_shared_name_is_copied_in_order(self) -> None:
        assert plan_bands(3, RGB, ("nir", "swir", "thermal")).sources == (0, 1, 2)
        assert plan_bands(3, None, ("nir", "swir", "thermal")).line is None

    def test_an_equal_count_with_some_shared_names_goes_by_name(self) -> None:
        assert plan_bands(3, RGB, ("nir", "red", "green")).sources == (None, 0, 1)


class TestRefusals:
    def test_a_wholly_wrong_file_is_named_with_its_first_keys(self, folder: Folder) -> None:
        state = {"encoder.patch_embed.weight": torch.zeros(4, 3), "b": torch.zeros(2), "c": torch.zeros(1)}
        with pytest.raises(InputError) as caught:
            started(folder, torch_bytes(state), card_of("unet"))
        text = str(caught.value)
        for words in (
            "do not fit unet",
            "encoder.patch_embed.weight (4, 3), b (2,), c (1,)",
            "a vision transformer",
        ):
            assert words in text

    def test_the_first_keys_are_those_that_the_file_begins_with(self, folder: Folder) -> None:
        state = {f"x{index:02d}": torch.zeros(index + 1) for index in range(20)}
        with pytest.raises(InputError, match=r"x00 \(1,\), x01 \(2,\), x02 \(3,\) and 17 more"):
            started(folder, safe_bytes(state), card_of("unet"))

    def test_a_network_that_is_refused_its_weights_is_left_as_it_was(self, folder: Folder) -> None:
        card = card_of("unet")
        state = random_state(network_of(card))
        state["ups.0.convs.0.0.weight"] = torch.zeros(1, 1, 3, 3)
        torch.manual_seed(3)
        model = network_of(card)
        with pytest.raises(InputError, match=r"ups\.0\.convs\.0\.0\.weight is \(1, 1, 3, 3\), not"):
            load_start(model, card, folder.start(torch_bytes(state)))
        assert_same(model.state_dict(), untouched(card))

    @pytest.mark.parametrize("lacks", ["head.bias", "downs.1.0.1.running_mean"])
    def test_a_missing_tensor_is_named(self, lacks: str, folder: Folder) -> None:
        state = random_state(network_of(card_of("unet")))
        del state[lacks]
        with pytest.raises(InputError, match=f"missing {lacks}"):
            started(folder, torch_bytes(state), card_of("unet"))

    def test_a_digest_may_be_a_prefix_and_another_one_is_refused_with_both_named(
        self, folder: Folder
    ) -> None:
        card = card_of("unet")
        data = torch_bytes(random_state(network_of(card)))
        digest = hashlib.sha256(data).hexdigest()
        for given in (digest, digest[:8]):
            assert load_start(network_of(card), card, folder.start(data, sha256=given)).sha256 == digest
        with pytest.raises(InputError) as caught:
            load_start(network_of(card), card, folder.start(data, sha256="0123abcd"))
        assert digest in str(caught.value)
        assert "0123abcd" in str(caught.value)

    def test_a_file_that_is_not_there_is_wrong_input(self, tmp_path: Path) -> None:
        card = card_of("unet")
        with pytest.raises(InputError, match="no such file of weights"):
            load_start(network_of(card), card, InitConfig(weights=str(tmp_path / "none.pth")))

    def test_without_weights_there_is_nothing_to_load(self) -> None:
        card = card_of("unet")
        with pytest.raises(ValueError, match="not set"):
            load_start(network_of(card), card, InitConfig())


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    """An http server on loopback and the files that it gives by path; 403 for what is under /secret/."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(200 if data is not None else 403 if "/secret/" in self.path else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


class TestHttp:
    def test_weights_come_over_http(self, served: tuple[str, dict[str, bytes]]) -> None:
        address, files = served
        card = card_of("unet")
        state = random_state(network_of(card))
        files["/models/unet.pth"] = data = torch_bytes(state)
        model = network_of(card)
        digest = hashlib.sha256(data).hexdigest()
        config = InitConfig(weights=f"{address}/models/unet.pth", sha256=digest[:8])
        report = load_start(model, card, config)
        assert_same(model.state_dict(), state)
        assert report.source == config.weights

    @pytest.mark.parametrize("path", ["none.pth", "secret/x.pth"])
    def test_an_answer_that_is_no_file_says_what_to_do(
        self, path: str, served: tuple[str, dict[str, bytes]]
    ) -> None:
        self.assert_refused(f"{served[0]}/models/{path}")

    def test_a_machine_that_reaches_nothing_says_what_to_do(self) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.assert_refused(f"http://127.0.0.1:{port}/models/resnet50-0676ba61.pth")
        self.assert_refused("http://no-such-host.invalid/models/resnet50-0676ba61.pth")

    def assert_refused(self, uri: str) -> None:
        card = card_of("unet")
        with pytest.raises(
            InputError, match=r"Fetch the file elsewhere and give its local path as init\.weights"
        ):
            load_start(network_of(card), card, InitConfig(weights=uri))

    def test_a_store_that_says_no_stays_a_fault_of_storage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(uri: str) -> bytes:
            raise StorageRefused("access denied", uri)

        monkeypatch.setattr("segpipe.models.pretrained.read_uri", refuse)
        card = card_of("unet")
        with pytest.raises(StorageRefused):
            load_start(network_of(card), card, InitConfig(weights="s3://bucket/w.pth"))


def test_the_report_tells_a_person_what_was_done(folder: Folder) -> None:
    data = torch_bytes(torchvision_state("mobilenet_v2"))
    card = card_of("unet_mobilenet_v2", bands=("red", "green", "blue", "nir"))
    _, report = started(folder, data, card)
    lines = report.lines()
    assert lines == [
        f"start: torchvision MobileNetV2 backbone, {folder.root}/weights",
        f"  sha256 {hashlib.sha256(data).hexdigest()}",
        f"  {report.loaded} tensors from the file",
        "  first layer: 3 bands to 4: each from the mean of the file's bands, so that a grey image gives the "
        "same response",
        "  left out of the file: features.17, features.18, classifier",
        f"  random start: {len(report.fresh)} parameters of ups, head",
    ]
    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301

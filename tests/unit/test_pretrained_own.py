"""The pretrained start from our own model files; other bands and classes; what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weights import (
    RGB,
    Folder,
    assert_same,
    card_of,
    network_of,
    random_state,
    safe_bytes,
    started,
    torch_bytes,
    torchvision_state,
    untouched,
)

from segpipe.config.card import ModelCard
from segpipe.config.train import InitConfig
from segpipe.errors import InputError
from segpipe.models.adapt import plan_bands
from segpipe.models.file import _encode, empty_model
from segpipe.models.pretrained import load_start


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
        plan = plan_bands(3, RGB, ("nir", "swir", "thermal"))
        assert plan.sources == (0, 1, 2)
        assert plan.line is not None
        assert plan.line.endswith("no band has its name: red, green, blue to nir, swir, thermal")
        assert plan_bands(3, None, ("nir", "swir", "thermal")).line is None

    def test_bands_that_are_copied_in_order_are_told(self, folder: Folder) -> None:
        state = torchvision_state("mobilenet_v2")
        card = card_of("unet_mobilenet_v2", bands=("nir", "swir", "thermal"))
        ours, report = started(folder, torch_bytes(state), card)
        assert torch.equal(ours["features.0.0.weight"], state["features.0.0.weight"])
        assert any("copied in the file's order" in line for line in report.lines())

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

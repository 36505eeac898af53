"""Weights made for other bands or classes: the first and the last layer, and nothing between.

Shapes: O outputs, B bands, C classes, k side of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segpipe.wording import few


@dataclass(frozen=True, slots=True)
class BandPlan:
    """Where the weights of each of our bands come from."""

    sources: tuple[int | None, ...]
    """Per band the file's band; None = the mean over the file's bands."""
    mean_scale: float
    """Factor on that mean."""
    line: str | None
    """The plan in plain words; None = copied as it is."""


def plan_bands(source_bands: int, source_names: Sequence[str] | None, names: Sequence[str]) -> BandPlan:
    """How a first layer of ``source_bands`` bands becomes one of ``len(names)`` bands.

    Bands of one name keep their weights, the others get the mean over the file's bands. Where no name helps,
    an equal count is copied in order; else the mean is repeated for all bands, scaled so that the response
    to a grey image (all bands equal) stays.
    """
    counts = f"first layer: {source_bands} bands to {len(names)}"
    known = list(source_names or ())
    shared = [name for name in names if name in known]
    if source_bands == len(names) and (not shared or list(names) == known):
        line = None
        if known and not shared:  # without a word, near infrared would pass for red
            line = (
                f"first layer: copied in the file's order, no band has its name: {few(known)} to {few(names)}"
            )
        return BandPlan(tuple(range(source_bands)), 1.0, line)
    if shared:
        sources = tuple(known.index(name) if name in known else None for name in names)
        line = f"{counts}: {', '.join(shared)} by name"
        others = [name for name in names if name not in known]
        line += f"; {', '.join(others)} from the mean of the file's bands" if others else ""
        return BandPlan(sources, 1.0, line)
    line = f"{counts}: each from the mean of the file's bands, so that a grey image gives the same response"
    return BandPlan((None,) * len(names), source_bands / len(names), line)


def adapt_bands(weight_OBkk: Tensor, plan: BandPlan) -> Tensor:
    """The first layer's weight for our bands, (O, len(plan.sources), k, k), of the same dtype."""
    if plan.line is None:
        return weight_OBkk
    mean = weight_OBkk.double().mean(dim=1) * plan.mean_scale
    parts = [
        mean.to(weight_OBkk.dtype) if source is None else weight_OBkk[:, source] for source in plan.sources
    ]
    return torch.stack(parts, dim=1)


@dataclass(frozen=True, slots=True)
class ClassPlan:
    """Where the rows of the last layer come from."""

    sources: tuple[int | None, ...]
    """Per class the file's row; None = it starts anew."""
    line: str | None
    """The plan in plain words; None = copied, the classes are the same."""

    @property
    def whole(self) -> bool:
        """No row starts anew."""
        return None not in self.sources

    @property
    def empty(self) -> bool:
        """Every row starts anew."""
        return all(source is None for source in self.sources)


def plan_classes(source_classes: int, source_names: Sequence[str] | None, names: Sequence[str]) -> ClassPlan:
    """How a last layer of ``source_classes`` rows fills one of ``len(names)`` rows.

    With names on both sides rows go by name. Without names in the file an equal count is copied in order, and
    another count fills nothing.
    """
    counts = f"last layer: {source_classes} classes to {len(names)}"
    if source_names is None:
        if source_classes == len(names):
            line = f"last layer: copied, its {source_classes} classes in the file's order"
            return ClassPlan(tuple(range(source_classes)), line)
        return ClassPlan((None,) * len(names), f"{counts}: starts anew")
    known = list(source_names)
    if known == list(names):
        return ClassPlan(tuple(range(len(known))), None)
    sources = tuple(known.index(name) if name in known else None for name in names)
    copied = [name for name in names if name in known]
    new = [name for name in names if name not in known]
    if not copied:
        return ClassPlan(sources, f"{counts}: no class has the same name, so it starts anew")
    line = f"{counts}: {few(copied)} by name" + (f"; {few(new)} start anew" if new else "")
    return ClassPlan(sources, line)


def adapt_classes(rows: Tensor, fresh: Tensor, plan: ClassPlan) -> Tensor:
    """Weight (C, ...) or bias (C,) of the last layer: rows of the file where the plan says so, else fresh."""
    parts = [fresh[index] if source is None else rows[source] for index, source in enumerate(plan.sources)]
    return torch.stack(parts).to(fresh.dtype)

"""The coverage ledger as a table on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from segpipe.masks.ledger import Line
from segpipe.masks.verify import Verification
from segpipe.wording import Named

_VERDICTS = {
    0: "The run is whole.",
    3: "Units are missing: the same command again computes them.",
    4: "Objects are damaged or not planned. Delete them and run the same command again to compute them anew.",
}
_PLAN_DAMAGED = (
    "A part of the plan is damaged or gone. Put a whole copy back, and delete no masks before; "
    "without a copy start anew with another --output."
)

_COLUMNS = ("blocks that are", "scenes", "units", "blocks", "Mpx", "km2", "Mpx of unknown size")
_WIDEST = 1_000

_SUCCESS = {
    "right": None,
    "absent": "_SUCCESS is not there yet: the same command again writes it.",
    "outdated": "_SUCCESS dates from before the run grew: the same command again renews it.",
    "wrong": "_SUCCESS does not say what is there.",
}


def render_ledger(verification: Verification, console: Console) -> None:
    """Print what became of every block of the plan, what is wrong by name, and the verdict."""
    ledger = verification.ledger
    console.print(f"Coverage of {escape(verification.root)}", style="italic", highlight=False, soft_wrap=True)
    _print_table([_cells(line) for line in ledger.ordered()], _cells(ledger.planned), console)
    sources = ", ".join(f"{escape(name)} {count:,}" for name, count in sorted(ledger.sources.items()))
    if sources:
        console.print(f"Scenes by what says which pixels are data: {sources}.")
    if ledger.superseded_scenes:
        console.print(f"Scenes replaced by newer versions of themselves: {ledger.superseded_scenes:,}.")
    _print_named(console, "Scenes more than 1.5 x coarser than the model", ledger.coarser)
    _print_named(console, "Missing units", verification.missing)
    _print_named(console, "Damaged objects", verification.damaged)
    _print_named(console, "Objects that are not in the plan", verification.unplanned)
    if verification.parts == 0:
        console.print("No part of the plan is there yet.")
    if not ledger.balanced:
        console.print("The lines do not add up to the plan.")
    note = _SUCCESS[verification.success]
    if note is not None and (verification.success == "wrong" or verification.complete):
        console.print(note)
    console.print(_PLAN_DAMAGED if verification.plan_damaged else _VERDICTS[verification.exit_code])


def _print_table(lines: list[list[str]], planned: list[str], console: Console) -> None:
    """Print every cell whole: a terminal that is narrow gets headers that wrap, a pipe the width it takes."""
    table = Table(box=box.HORIZONTALS, pad_edge=False, collapse_padding=True)
    for name, *cells in zip(_COLUMNS, *lines, planned, strict=True):
        justify: JustifyMethod = "right" if table.columns else "left"
        table.add_column(name, justify=justify, overflow="fold", min_width=max(map(len, cells)))
    for cells in lines:
        table.add_row(*map(escape, cells))
    table.add_section()
    table.add_row(*map(escape, planned))
    needed = Measurement.get(console, console.options.update(width=_WIDEST), table)
    width = min(needed.maximum, console.width) if console.is_terminal else needed.maximum
    table.width = max(needed.minimum, width)
    console.print(table, crop=False)


def _cells(line: Line) -> list[str]:
    name = line.status if line.kind is None else f"{line.status}: {line.kind}"
    megapixels, unknown = line.pixels / 1e6, line.unknown_px / 1e6
    counts = [f"{count:,}" for count in (line.scenes, line.units, line.blocks)]
    return [name, *counts, f"{megapixels:,.1f}", f"{line.km2:,.3f}", f"{unknown:,.1f}"]


def _print_named(console: Console, what: str, named: Named) -> None:
    if named.count == 0:
        return
    console.print(f"{what}: {named.count:,}")
    for name in named.first:
        console.print(f"  {escape(name)}", soft_wrap=True)
    if named.count > len(named.first):
        console.print(f"  and {named.count - len(named.first):,} more")

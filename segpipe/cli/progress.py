"""Progress on stderr: a bar on a terminal, plain lines elsewhere; nothing of it on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from segpipe.cli import signals
from segpipe.pipelines.events import Events
from segpipe.wording import counted

if TYPE_CHECKING:
    from segpipe.pipelines.worker import UnitResult

_LINE_EVERY_S: Final = 10.0


class ProgressEvents(Events):
    """Shows planning, units with Mpx/s, km2/h and ETA, and the reading of reports."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._started_s = 0.0
        self._last_line_s = 0.0
        self._missing = self._ended = self._failed_blocks = 0
        self._scene_px = 0
        self._area_m2 = 0.0

    def __enter__(self) -> ProgressEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def message(self, text: str) -> None:
        self._print(text)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}")

    def planned(self, scenes: int, total: int) -> None:
        signals.check()
        if scenes == total and total > 1:
            self._print(f"planned {counted(total, 'scene')}")
        elif self._due():
            self._print(f"reading headers: {scenes} of {total} scenes")

    def started(self, units: int, missing: int) -> None:
        self._missing = missing
        self._started_s = self._last_line_s = time.monotonic()
        if not missing:
            self._print("all units are there already; nothing to compute")
            return
        there = f", {units - missing} there already" if missing < units else ""
        self._print(f"{counted(missing, 'unit')} to compute{there}")
        if self._on_terminal():
            self._open_bar()

    def unit(self, result: UnitResult) -> None:
        signals.check()
        self._ended += 1
        self._failed_blocks += result.failed
        if not result.skipped:
            self._scene_px += result.scene_px
            self._area_m2 += result.area_m2
        if self._bar is not None:
            self._bar.update(self._task, completed=self._ended, rates=self._rates())
        elif self._due() or self._ended == self._missing or self._ended == 1:
            self._print(f"{self._ended} of {self._missing} units  {self._rates()}")

    def reporting(self, done: int, total: int) -> None:
        signals.check()
        self._close_bar()
        if self._due():
            self._print(f"reports: {done} of {total} units read")

    def _rates(self) -> str:
        elapsed_s = max(1e-6, time.monotonic() - self._started_s)
        parts = [f"{self._scene_px / 1e6 / elapsed_s:.2f} Mpx/s"]
        if self._area_m2:
            parts.append(f"{self._area_m2 / 1e6 / elapsed_s * 3600:.4g} km2/h")
        if 0 < self._ended < self._missing:
            left_s = elapsed_s / self._ended * (self._missing - self._ended)
            parts.append(f"ETA {format_duration(left_s)}")
        if self._failed_blocks:
            parts.append(f"{counted(self._failed_blocks, 'block')} failed")
        return "  ".join(parts)

    def _due(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._last_line_s < _LINE_EVERY_S:
            return False
        self._last_line_s = now_s
        return True

    def _on_terminal(self) -> bool:
        return not self._quiet and sys.stderr.isatty()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("units"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("units", total=self._missing, rates="")
        self._bar.start()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"

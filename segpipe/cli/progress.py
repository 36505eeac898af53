"""Progress on stderr: a bar on a terminal, plain lines elsewhere; nothing of it on stdout."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from segpipe.cli import signals
from segpipe.pipelines.events import Events
from segpipe.wording import counted, plain

if TYPE_CHECKING:
    from segpipe.pipelines.worker import UnitResult

_LINE_EVERY_S: Final = 10.0


class StderrLines(Events):
    """Messages and warnings as lines, above a bar where one is open; a context that closes the bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last_line_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()

    def message(self, text: str) -> None:
        self._print(text)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}")

    def count(self, what: str, done: int, total: int) -> None:
        """Show the progress of work that reports only a count."""
        signals.check()
        if self._bar is None:
            self._open_bar(what, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._due():
            self._print(f"{what}: {done} of {total}")

    def _due(self) -> bool:
        """Whether the last line that asked this is long enough ago for another."""
        now_s = time.monotonic()
        if now_s - self._last_line_s < _LINE_EVERY_S:
            return False
        self._last_line_s = now_s
        return True

    def _open_bar(self, noun: str, total: int, done: int = 0) -> None:
        """Show a bar from here on if stderr is a terminal."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn(noun),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(noun, total=total, completed=done, rates="")
        self._bar.start()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


class ProgressEvents(StderrLines):
    """Shows planning, units with Mpx/s, km2/h and ETA, and the reading of reports."""

    def __init__(self) -> None:
        super().__init__()
        self._started_s = 0.0
        self._missing = self._ended = self._failed_blocks = 0
        self._scene_px = 0
        self._area_m2 = 0.0

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
        self._open_bar("units", missing)

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
            self._print(f"{self._ended} of {counted(self._missing, 'unit')}  {self._rates()}")

    def reporting(self, done: int, total: int) -> None:
        signals.check()
        self._close_bar()
        if self._due():
            self._print(f"reports: {done} of {counted(total, 'unit')} read")

    def _rates(self) -> str:
        elapsed_s = max(1e-6, time.monotonic() - self._started_s)
        parts = [f"{self._scene_px / 1e6 / elapsed_s:.2f} Mpx/s"]
        if self._area_m2:
            parts.append(f"{plain(self._area_m2 / 1e6 / elapsed_s * 3600)} km2/h")
        if 0 < self._ended < self._missing:
            left_s = elapsed_s / self._ended * (self._missing - self._ended)
            parts.append(f"ETA {format_duration(left_s)}")
        if self._failed_blocks:
            parts.append(f"{counted(self._failed_blocks, 'block')} failed")
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"

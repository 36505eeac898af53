"""What a driver tells its caller while it works: a no-op base that the command line overrides."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segpipe.pipelines.worker import UnitResult


class Events:
    """Callbacks of one run, called from the driver's thread alone. All do nothing here."""

    def message(self, text: str) -> None:
        """A line worth reading, such as how many scenes are new."""

    def warning(self, text: str) -> None:
        """Something the user should look at; the run goes on."""

    def planned(self, scenes: int, total: int) -> None:
        """``scenes`` of ``total`` headers are read."""

    def started(self, units: int, missing: int) -> None:
        """The plan has ``units`` units, of which ``missing`` are to be computed."""

    def unit(self, result: UnitResult) -> None:
        """A unit ended."""

    def reporting(self, done: int, total: int) -> None:
        """``done`` of the run's ``total`` units are read for the reports."""

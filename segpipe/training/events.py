"""What a training tells its caller while it runs: a no-op base that the command line overrides."""

from __future__ import annotations

from segpipe.pipelines.events import Events
from segpipe.training.history import ScoreRow, StepRow


class TrainEvents(Events):
    """Callbacks of one training, called from the driver's thread alone. All do nothing here."""

    def begun(self, first_step: int, total_steps: int) -> None:
        """``first_step`` of ``total_steps`` are done already."""

    def step(self, row: StepRow) -> None:
        """A step ended; with Ray only the newest of each half second is told."""

    def score(self, row: ScoreRow) -> None:
        """A validation ended."""

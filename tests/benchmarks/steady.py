"""The steady rate of one local worker, from a single run.

Between the ends of two units, the first one and the last at whose end as many others are in flight: so
neither the start, nor the reports, nor half-done units count.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NOOP_MODEL = '''
import torch
from segpipe.models import file
from segpipe.models.blocks import SegmentationModel

class Noop(SegmentationModel):
    """No network: class 0 everywhere, at the resolution of 1/32."""
    def forward_low(self, x):
        low = torch.zeros(x.shape[0], 2, x.shape[2] // 32, x.shape[3] // 32)
        low[:, 0] = 1.0
        return low

load = file.load_model_bytes
file.load_model_bytes = lambda data, uri: (Noop().eval(), load(data, uri)[1])
'''
"""Code that puts a network that does nothing in place of any model."""

_SCRIPT = """
import sys, time
from segpipe.config.load import load_config
from segpipe.pipelines import predict
from segpipe.pipelines.job import make_job
from segpipe.pipelines.events import Events
from segpipe.pipelines.worker import UNITS_IN_FLIGHT

class Watch(Events):
    def __init__(self):
        self.ended = []
    def unit(self, result):
        self.ended.append((time.perf_counter(), result.scene_px))

flags = {"input.scenes": [sys.argv[2]], "model": sys.argv[1], "output": sys.argv[3]}
config = load_config(None, flags, ["cluster.executor=local"], "benchmark")
watch = Watch()
outcome = predict.run_job(make_job(config), watch)
assert outcome.exit_code == 0, outcome
(begun, _), *rest = watch.ended[: 1 - UNITS_IN_FLIGHT]
print(sum(px for _, px in rest) / 1e6 / (rest[-1][0] - begun))
"""


def rate(network: str, model: Path, archive: str, output: str) -> float:
    """Mpx/s of ``segpipe predict`` without Ray; ``network``: `NOOP_MODEL`, or "" for the model file's."""
    command = [sys.executable, "-c", network + _SCRIPT, str(model), archive, output]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

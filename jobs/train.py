"""Run ``segpipe train`` as a Ray job.

    ray job submit --working-dir . -- python -m jobs.train --config URI

All arguments are those of the command; Ray's job supervisor names the cluster in RAY_ADDRESS.
"""

from __future__ import annotations

import sys

from segpipe.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

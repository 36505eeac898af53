"""Kills processes from within, for tests: Python imports this first where its folder is on PYTHONPATH.

FAULT_SCENE   part of the id of the scene whose pixels, once read, end the process by SIGKILL
FAULT_KIND    "gpu": it does not end, but has a GPU that fails from then on
FAULT_MARKER  a file that stands for "it has happened": with it, only once
FAULT_START   "kill": a worker's process ends while it starts
FAULT_SLOW_S  seconds that every block takes longer
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time

_MODULE = "segpipe.pipelines.segment"


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _lose_gpu():
    global _lost
    _lost = True


_lost = False


def _once():
    """True for one process in all, and always without FAULT_MARKER."""
    marker = os.environ.get("FAULT_MARKER")
    if not marker:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _patch(module):
    start, make = module.EngineSource.start, module.make_source

    def start_and_fail(self, scene, block):
        result = start(self, scene, block)
        time.sleep(float(os.environ.get("FAULT_SLOW_S", "0")))
        wanted = os.environ.get("FAULT_SCENE")
        if wanted and wanted in scene.source.scene_id and _once():
            _lose_gpu() if os.environ.get("FAULT_KIND") == "gpu" else _die()
        if _lost:
            import torch

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return result

    def make_and_fail(*args):
        if os.environ.get("FAULT_START") == "kill":
            _die()
        return make(*args)

    module.EngineSource.start = start_and_fail
    module.make_source = make_and_fail


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_patch(module):
            execute(module)
            _patch(module)

        loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, _Finder())

"""Tracing without the noise of torch's exporter, and without pauses for garbage collection."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_trace() -> Iterator[None]:
    """No warnings about torchvision and pytree internals, and no garbage collection.

    Tracing makes millions of objects that all stay alive; walking them took a quarter of the time.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    collects = gc.isenabled()
    gc.disable()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if collects:
            gc.enable()

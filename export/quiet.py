"""Lowering without the noise that torch and ExecuTorch make about their own internals."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Mute warnings, and the log below errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def quiet_trace() -> Iterator[None]:
    """`quiet`, and no garbage collection.

    Tracing makes millions of objects that all stay alive; walking them took a quarter of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with quiet():
            yield
    finally:
        if collects:
            gc.enable()

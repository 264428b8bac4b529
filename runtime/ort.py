"""onnxruntime, imported in one place, with its telemetry switched off before it can start.

Releases from 1.31 on write a device id and events below the user's cache directory and resolve a
telemetry host after two minutes, unless ORT_DISABLE_TELEMETRY is set when the library is loaded.
Everything here that needs onnxruntime imports it from this module.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as onnxruntime  # read when the library is loaded

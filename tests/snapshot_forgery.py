"""Snapshots that say something else than was kept, with a digest that fits."""

import hashlib
import json
import struct


def forge(path, to, **changes):
    """The snapshot at `path` with other header fields, or without those that are None."""
    raw = path.read_bytes()
    magic, version, length = struct.unpack("<8sII", raw[:16])
    header = {**json.loads(raw[16 : 16 + length]), **changes}
    text = json.dumps({k: v for k, v in header.items() if v is not None}).encode()
    return seal(to, struct.pack("<8sII", magic, version, len(text)) + text + raw[16 + length : -32])


def header_of(path):
    """The header of the snapshot at `path`."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<I", raw[12:16])
    return json.loads(raw[16 : 16 + length])


def seal(to, body):
    """Write the bytes of a snapshot and the digest that fits them."""
    to.write_bytes(body + hashlib.sha256(body).digest())
    return to

"""Numbers of tokens as people write them."""

import pytest

from edge_kv.amounts import parse_size
from edge_kv.errors import ConfigError


def test_sizes():
    assert [parse_size(t) for t in ("32768", "32,768", "32k", "1.5k", "128K", " 1m ")] == [
        32_768, 32_768, 32_768, 1536, 131_072, 1 << 20,
    ]  # fmt: skip
    for bad in ("", "k", "0", "-1", "1.5", "1.0001k", "32 kb", "3,2768", "9" * 400, "١k"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(bad)

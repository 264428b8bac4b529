"""Text: bytes as they come, and streams whose pieces join to the text of all ids."""

import json
import random
import subprocess
import sys

import pytest
from fake_artifact import write_artifact
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from edge_kv.errors import ArtifactError, PromptError
from edge_kv.runtime.text import TextStream, Tokenizer, clean_text

SPECIALS = ["<eos>", "<bos>", "<mark>"]


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A byte-fallback vocabulary of SentencePiece's kind, with its leading space stripped."""
    letters = [*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdé€", "▁a"]
    engine = Engine(
        models.BPE(
            vocab={t: i for i, t in enumerate(letters)}, merges=[("▁", "a")], byte_fallback=True
        )
    )
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    engine.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    engine.save(str(path))
    return Tokenizer(path, bos_id=1)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    root = write_artifact(tmp_path_factory.mktemp("bytes") / "a", programs=False, verify=False)
    return Tokenizer(root / "tokenizer.json", bos_id=2)


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return "".join([stream.feed(i) for i in ids] + [stream.flush()])


def byte_ids(tokenizer, data):
    return [tokenizer.id_of(f"<0x{b:02X}>") for b in data]


def test_valid_text_decodes_as_the_engine_decodes_it(fallback, byte_level):
    rng = random.Random(0)
    for tokenizer in (fallback, byte_level):
        for _ in range(300):
            text = "".join(rng.choices(" aabcdé€世🎉\n", k=rng.randint(0, 12)))
            ids = tokenizer.encode(text)
            assert (
                streamed(tokenizer, ids) == tokenizer._engine.decode(ids) == tokenizer.decode(ids)
            )


def test_broken_bytes_stream_as_they_decode(fallback):
    """The oracle: Python's own decoder over the bytes, one run of byte tokens after another."""
    rng = random.Random(1)
    a = fallback.id_of("a")
    for _ in range(500):
        ids, expected = [], ""
        for _ in range(rng.randint(1, 5)):
            data = bytes(
                rng.choices([0xFF, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0x41], k=rng.randint(0, 6))
            )
            ids += [*byte_ids(fallback, data), a]
            expected += data.decode("utf-8", "replace") + "a"
        assert streamed(fallback, ids) == fallback.decode(ids) == expected
    euro = byte_ids(fallback, "€".encode())
    stream = TextStream(fallback)
    pieces = [stream.feed(i) for i in [*byte_ids(fallback, b"\xff"), *euro, *euro]]
    assert pieces == ["", "\ufffd", "", "€", "", "", "€"] or "".join(pieces) == "\ufffd€€"


def test_special_tokens_are_text_only_when_asked(fallback):
    ids = [fallback.id_of("<mark>"), fallback.id_of("a"), fallback.id_of("<eos>")]
    assert fallback.decode(ids) == "a"
    assert fallback.decode(ids, special=True) == "<mark>a<eos>"


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"\xef\xbb\xbfIn", "In"),
        ("\ufeffIn \ufeff", "In \ufeff"),
        ("héllo", "héllo"),
        ("héllo".encode(), "héllo"),
    ],
)
def test_text_from_outside_is_made_alike(given, clean):
    assert clean_text(given) == clean


@pytest.mark.parametrize("given", [b"caf\xe9", "caf\udce9", "\ud800"])
def test_what_is_no_utf8_is_refused(given, byte_level):
    with pytest.raises(PromptError, match="not UTF-8 text"):
        clean_text(given)
    if isinstance(given, str):
        with pytest.raises(PromptError, match="not UTF-8 text"):
            byte_level.encode(given)


def test_an_argument_that_is_no_utf8_is_one_sentence(tmp_path):
    root = write_artifact(tmp_path / "a")
    command = [sys.executable, "-m", "edge_kv", "run", str(root), b"caf\xe9", "--json"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and done.stderr.decode().startswith(
        "Error: The prompt is not UTF-8"
    )


def test_added_tokens_without_a_row_are_ordinary_text(fallback, tmp_path):
    """Gemma 3's text models have no row for the image token their tokenizer knows."""
    raw = json.loads(fallback.json())
    rows = fallback.vocab_size
    image = {"id": rows, "content": "<image>", "special": True, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}  # fmt: skip
    raw["added_tokens"].append(image)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw))
    assert rows in Tokenizer(path, bos_id=1, rows=rows + 1).encode("a<image>b")
    limited = Tokenizer(path, bos_id=1, rows=rows)
    assert limited.encode("a<image>b") == fallback.encode("a<image>b")
    assert max(limited.encode("a<image>b")) < rows
    assert limited.special == fallback.special


def test_rules_that_give_up_on_a_text_are_one_sentence(tmp_path):
    """The Rust side panics with a class of its own that is no Exception."""
    engine = Engine(models.BPE({"a": 0, "b": 1}, []))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", bos_id=None)
    assert tokenizer.encode("aab") == [0, 0, 1]
    with pytest.raises(PromptError, match=r"gives up on the prompt \(Onig: .*\); shorten it"):
        tokenizer.encode("a" * 5000 + "b")
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    text["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ArtifactError, match=r"is not a tokenizer .*Precompiled"):
        Tokenizer(tmp_path / "tokenizer.json", bos_id=None)

"""Text: the artifact's tokenizer, and ids streamed back into text, never splitting a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_kv import heap
from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError, PromptError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how byte-fallback vocabularies spell a byte


def clean_text(text: str | bytes, what: str = "prompt") -> str:
    """Text from outside as models were trained on it: no byte order mark, lines end in LF.

    Raises:
        PromptError: it is not UTF-8, or holds half of a surrogate pair (what Python makes of the
            bytes of an argument that are no UTF-8).
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        decoded.encode("utf-8")
    except UnicodeError as e:
        at = f"byte {e.start}" if isinstance(e, UnicodeDecodeError) else "a lone surrogate"
        raise PromptError(f"The {what} is not UTF-8 text ({at}); convert it first.") from e
    return decoded.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


class _Panic(Exception):
    """The Rust side of tokenizers gave up."""


@contextmanager
def _no_panic() -> Iterator[None]:
    """Turn a panic, which is a BaseException of a class that cannot be imported, into `_Panic`."""
    try:
        yield
    except BaseException as e:
        if type(e).__module__ != "pyo3_runtime":
            raise
        raise _Panic(" ".join(str(e).split())[:160]) from e


class Tokenizer:
    """A `tokenizers` file with the special ids of its model."""

    def __init__(
        self, path: Path, *, bos_id: int | None, add_bos: bool = True, rows: int | None = None
    ) -> None:
        """Read `tokenizer.json`.

        `rows` is how many ids the model has; left out, as many as the vocabulary without added
        tokens. Added tokens beyond are not recognised: their characters are ordinary text.

        Raises:
            ArtifactError: missing or not a tokenizer.
        """
        from tokenizers import Tokenizer as Engine

        try:
            with _no_panic():
                self._engine: Any = _within(Engine.from_file(str(path)), rows)
            self._engine.no_truncation()  # lengths of a training, which are no prompt's
            self._engine.no_padding()
        except Exception as e:  # tokenizers raises plain Exception for anything it cannot read
            raise ArtifactError(
                f"{path} is not a tokenizer ({e}); copy or export the artifact again."
            ) from e
        heap.trim()
        self.bos_id = bos_id
        self.add_bos = add_bos

    @classmethod
    def of(cls, artifact: Artifact) -> Tokenizer:
        """The tokenizer of an artifact.

        Raises:
            ArtifactError: the artifact has none (it was exported from weights without one).
        """
        entry = artifact.manifest.tokenizer
        if entry is None:
            raise ArtifactError(
                f"{artifact.root} has no tokenizer (its weights came without one), so it takes no "
                "text; feed token ids through edge_kv.runtime instead."
            )
        path = artifact.path(entry.file)
        tokens = artifact.tokens
        return cls(path, bos_id=tokens.bos, add_bos=entry.add_bos, rows=tokens.vocab)

    @property
    def bos_token(self) -> str:
        """Text of the start token, for chat templates."""
        return "" if self.bos_id is None else self.token(self.bos_id)

    def token(self, token_id: int) -> str:
        """Text of one id as the vocabulary spells it; empty when it has none."""
        return self._engine.id_to_token(token_id) or ""

    @property
    def vocab_size(self) -> int:
        """How many ids the tokenizer knows, added tokens included."""
        return int(self._engine.get_vocab_size())

    def id_of(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it; None when it is not one token."""
        found: int | None = self._engine.token_to_id(token)
        return found

    def json(self) -> str:
        """The tokenizer as the text of its file."""
        text: str = self._engine.to_str()
        return text

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of `text`, special tokens in it recognised.

        `start`: this is the start of the context, so the start token goes first unless `text`
        brings it or the model was trained without one.

        Raises:
            PromptError: `text` holds half of a surrogate pair, or the tokenizer's rules for
                splitting text give up on it.
        """
        try:
            with _no_panic():
                ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        except _Panic as e:
            raise PromptError(
                f"The tokenizer of this model gives up on the prompt ({e}); shorten it, or use the "
                "tokenizer of another checkpoint."
            ) from e
        except (UnicodeError, TypeError) as e:  # what tokenizers says of a lone surrogate
            raise PromptError(
                "The prompt is not UTF-8 text (a lone surrogate); convert it first."
            ) from e
        if self.bos_id is None:
            return ids
        if start and self.add_bos and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, with special tokens as the vocabulary spells them or without them.

        Bytes that are no UTF-8 become U+FFFD, one for each part of a character that breaks off.
        """
        stream = TextStream(self, special=special)
        return "".join([*map(stream.feed, ids), stream.flush()])

    def spelled(self, ids: Sequence[int]) -> str:
        """Text of `ids` by the tokenizer's own decoder, without special tokens."""
        text: str = self._engine.decode(list(ids), skip_special_tokens=True)
        return text

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special tokens: they make no text."""
        added = self._engine.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of an id where the vocabulary is one of bytes; None where it takes a decoder.

        Byte-level vocabularies spell every byte as a letter of its own, others have tokens `<0xE2>`
        for what is not in the vocabulary.
        """
        token: str | None = self._engine.id_to_token(token_id)
        if token is None:
            return b""
        if self._letters is not None:
            try:
                return bytes(self._letters[letter] for letter in token)
            except KeyError:  # an added token, spelled as it is
                return token.encode()
        found = _BYTE.fullmatch(token) if self._has_bytes else None
        return bytes([int(found[1], 16)]) if found else None

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """Letter -> byte of a byte-level vocabulary; None for others."""
        return _byte_letters() if type(self._engine.decoder).__name__ == "ByteLevel" else None

    @cached_property
    def _has_bytes(self) -> bool:
        return self._engine.token_to_id("<0x0A>") is not None


def _within(engine: Any, rows: int | None) -> Any:
    """`engine` without added tokens whose ids are `rows` or more."""
    limit = engine.get_vocab_size(with_added_tokens=False) if rows is None else rows
    if all(i < limit for i in engine.get_added_tokens_decoder()):
        return engine
    raw = json.loads(engine.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < limit]
    return type(engine).from_str(json.dumps(raw))


class TextStream:
    """Ids in, pieces of text out; joined, the pieces are `Tokenizer.decode` of all ids.

    A piece is held back while it ends inside a character. Where the vocabulary needs a decoder, an
    id is decoded together with the ones before it, because a decoder may treat the first id of a
    text differently (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        """`special`: special tokens are text too, as the vocabulary spells them."""
        self._tokenizer = tokenizer
        self._special = special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[
            int
        ] = []  # the newest id that made text, and those after it that made none
        self._fed = self._done = 0

    @property
    def done(self) -> int:
        """How many ids' text was given out."""
        return self._done

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._fed += 1
        piece = self._text(token)
        if not self._bytes.getstate()[0]:
            self._done = self._fed
        return piece

    def flush(self) -> str:
        """What was held back when the ids end, an unfinished character as U+FFFD."""
        self._done = self._fed
        return self._ended()

    def _ended(self) -> str:
        piece = self._bytes.decode(b"", True)
        self._bytes.reset()
        return piece

    def _text(self, token: int) -> str:
        if token in self._tokenizer.special:
            return self._ended() + self._tokenizer.token(token) if self._special else ""
        data = self._tokenizer.token_bytes(token)
        if data is not None:
            if data:
                self._before = [token]
            return self._bytes.decode(data)
        given = self._tokenizer.spelled(self._before)
        piece = self._tokenizer.spelled([*self._before, token])[len(given) :]
        self._before = [token] if piece else [*self._before, token]
        return self._ended() + piece


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with (GPT-2's table).

    Printable bytes stand for themselves; the others take the letters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}

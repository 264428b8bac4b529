"""Text: the artifact's tokenizer, and ids streamed back into text, never splitting a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError
from edge_kv.runtime import heap

_UNFINISHED = "\ufffd"  # what decoders put where the bytes of a character are not complete


class Tokenizer:
    """A `tokenizers` file with the special ids of its model."""

    def __init__(self, path: Path, *, bos_id: int, add_bos: bool = True) -> None:
        """Read `tokenizer.json`.

        Raises:
            ArtifactError: missing or not a tokenizer.
        """
        from tokenizers import Tokenizer as Engine

        try:
            self._engine: Any = Engine.from_file(str(path))
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
        return cls(path, bos_id=artifact.config.bos_id, add_bos=entry.add_bos)

    @property
    def bos_token(self) -> str:
        """Text of the start token, for chat templates."""
        return self._engine.id_to_token(self.bos_id) or ""

    def token(self, token_id: int) -> str:
        """Text of one id as the vocabulary spells it; empty when it has none."""
        return self._engine.id_to_token(token_id) or ""

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of `text`, special tokens in it recognised.

        `start`: this is the start of the context, so the start token goes first unless `text`
        brings it or the model was trained without one.
        """
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        if start and self.add_bos and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self._engine.decode(ids, skip_special_tokens=True)
        return text


class TextStream:
    """Ids in, pieces of text out; joined, the pieces are the text of all ids.

    A piece is held back while it ends inside a character. Each id is decoded together with the
    ones before it since the last piece, because a decoder may treat the first id of a text
    differently (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # where decoding starts
        self._done = 0

    @property
    def done(self) -> int:
        """How many ids' text was given out."""
        return self._done

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return piece

    def flush(self) -> str:
        """What was held back when the ids end, unfinished characters as U+FFFD."""
        piece = self._pending()
        self._context = self._done = len(self._ids)
        return piece

    def _pending(self) -> str:
        given = self._tokenizer.decode(self._ids[self._context : self._done])
        both = self._tokenizer.decode(self._ids[self._context :])
        return both[len(given) :]

"""A `tokenizer.json` is tried before an export relies on it, and fitted to the model's rows."""

from __future__ import annotations

import json
from typing import Any

from edge_kv.errors import WeightsError

_TRIED = "The quick brown fox: 1 + 1 = 2.\n"


def usable_tokenizer(content: str, vocab_size: int, where: str) -> str:
    """`content`, without the tokens that a model of `vocab_size` rows does not have.

    Gemma 3's text models have no row for the image token their tokenizer knows: its characters
    are then ordinary text.

    Raises:
        WeightsError: it is no tokenizer, or none is left without those tokens.
    """
    if _largest(content, where) < vocab_size:
        return content
    raw = json.loads(content)
    added, model = raw.get("added_tokens") or [], raw["model"]
    raw["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    if isinstance(model.get("vocab"), dict):
        vocab = {t: i for t, i in model["vocab"].items() if i < vocab_size}
        model["vocab"] = vocab
        if isinstance(model.get("merges"), list):
            model["merges"] = [m for m in model["merges"] if _known(m, vocab)]
    else:  # Unigram: the id is the index
        model["vocab"] = model["vocab"][:vocab_size]
    fitted = json.dumps(raw, ensure_ascii=False)
    if _largest(fitted, where) >= vocab_size:
        raise WeightsError(
            f"The tokenizer of {where} knows more tokens than the model has rows ({vocab_size}); "
            "use the tokenizer of this checkpoint."
        )
    return fitted


def _known(merge: str | list[str], vocab: dict[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab


def _largest(content: str, where: str) -> int:
    """The largest id of a tokenizer that reads and encodes."""
    from tokenizers import Tokenizer

    try:
        engine: Any = Tokenizer.from_str(content)
        engine.encode(_TRIED, add_special_tokens=False)
        return max(engine.get_vocab().values(), default=-1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # plain Exception, and what its Rust side panics with
        reason = " ".join(str(e).split())[:160]
        raise WeightsError(
            f"The tokenizer.json of {where} is not a tokenizer ({reason}); download it again."
        ) from e

"""A `tokenizer.json` is tried before an export relies on it, fitted to the model's rows, and asked
what a text begins with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from edge_kv.errors import WeightsError

_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of added tokens
_TRIED = "The quick brown fox: 1 + 1 = 2.\n"


def usable_tokenizer(content: str, vocab_size: int, where: str) -> str:
    """`content`, without the added tokens that a model of `vocab_size` rows does not have, and
    without what is left from a training: lengths that texts are cut or filled up to, which
    transformers ignores, and merges that are left out at random.

    Gemma 3's text models have no row for the image token their tokenizer knows: its characters
    are then ordinary text.

    Raises:
        WeightsError: it is no tokenizer, or has other pieces that the model has no row for.
    """
    engine = opened(content, where)
    if getattr(engine.model, "dropout", None):
        engine.model.dropout = None
        content = engine.to_str()
    if engine.truncation or engine.padding:
        engine.no_truncation()
        engine.no_padding()
        content = engine.to_str()
    if max(engine.get_vocab().values(), default=-1) < vocab_size:
        return content
    raw = json.loads(content)
    added, model = raw.get("added_tokens") or [], raw["model"]
    raw["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    own = {token["content"] for token in added}
    if any(i >= vocab_size and t not in own for t, i in engine.get_vocab(False).items()):
        raise _too_many(where, vocab_size)
    if isinstance(model.get("vocab"), dict):
        vocab = {t: i for t, i in model["vocab"].items() if i < vocab_size}
        model["vocab"] = vocab
        if isinstance(model.get("merges"), list):
            model["merges"] = [m for m in model["merges"] if _known(m, vocab)]
    else:  # Unigram: the id is the index
        model["vocab"] = model["vocab"][:vocab_size]
    fitted = json.dumps(raw, ensure_ascii=False)
    if max(opened(fitted, where).get_vocab().values(), default=-1) >= vocab_size:
        raise _too_many(where, vocab_size)
    return fitted


def _too_many(where: str, vocab_size: int) -> WeightsError:
    return WeightsError(
        f"The tokenizer of {where} knows more tokens than the model has rows ({vocab_size}); "
        "use the tokenizer of this checkpoint."
    )


def with_added(
    content: str,
    listed: Iterable[Mapping[str, Any]],
    special: Iterable[str | Mapping[str, Any]],
    where: str,
) -> str:
    """`content` with the added tokens that are listed beside it, as transformers completes it.

    Those it has with other flags get the listed ones, those it lacks the next ids; tokens named
    `special` that are no added tokens become some.

    Raises:
        WeightsError: it is no tokenizer, or an entry is none.
    """
    engine = opened(content, where)
    held = {token.content: _flags(token) for token in engine.get_added_tokens_decoder().values()}
    try:
        tokens = [_token(entry) for entry in listed]
        named = [_token({"content": t} if isinstance(t, str) else t, special=True) for t in special]
    except (TypeError, UnicodeError) as e:  # half of a surrogate pair can stand in JSON
        raise WeightsError(
            f"{where} lists an added token that is none ({e}); download the tokenizer again."
        ) from e
    known = {*held, *(token.content for token in tokens)}
    tokens += [token for token in named if token.content not in known]
    new = [token for token in tokens if held.get(token.content) != _flags(token)]
    if not new:
        return content
    engine.add_tokens(new)
    completed: str = engine.to_str()
    return completed


def _token(entry: Mapping[str, Any], **flags: bool) -> Any:
    from tokenizers import AddedToken

    if not isinstance(entry.get("content"), str):
        raise TypeError(f"its content is {entry.get('content')!r}")
    return AddedToken(**{k: v for k, v in entry.items() if k in _FLAGS} | flags)


def _flags(token: Any) -> tuple[bool, ...]:
    return tuple(getattr(token, name) for name in _FLAGS)


def text_start(
    engine: Any, named: str | None, bos_id: int | None, vocab_size: int, where: str
) -> tuple[int | None, bool]:
    """The start token that templates may name, and whether it goes before every text.

    As in transformers, the tokenizer's own last step decides about the latter: that a config has a
    start token does not put it before texts (Qwen's config has one, its texts do not).

    Args:
        engine: the tokenizer, as `opened`.
        named: `Text.named` of it.
        bos_id: the start token of the model's config, where none is named.

    Raises:
        WeightsError: it begins texts with a token the model does not have, with several, or with
            another than the named one.
    """
    encoded = engine.encode(_TRIED)
    begun = encoded.tokens[: [*encoded.special_tokens_mask, 0].index(0)]
    added = encoded.ids[0] if begun else None
    if added is not None and added >= vocab_size:
        raise WeightsError(
            f"The tokenizer of {where} begins a text with token {added}, and the model has "
            f"{vocab_size}; use the tokenizer of this checkpoint."
        )
    wanted = engine.token_to_id(named) if named else added
    if len(begun) > 1 or added not in (None, wanted):
        raise WeightsError(
            f"The tokenizer of {where} begins a text with {begun}, expected its bos_token alone "
            f"({named or 'it names none'}); name that in tokenizer_config.json, or use another "
            "tokenizer."
        )
    if named or added is not None:
        return wanted, added is not None
    return (None if named == "" else bos_id), False


def text_end(engine: Any, named: str | None) -> list[int]:
    """The end token that templates are told (`Text.named`), as far as the tokenizer has it."""
    found = engine.token_to_id(named) if named else None
    return [] if found is None else [found]


def _known(merge: str | list[str], vocab: dict[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab


def opened(content: str, where: str) -> Any:
    """The tokenizer, which has encoded a text. Reading a large one takes a second.

    Raises:
        WeightsError: it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        engine: Any = Tokenizer.from_str(content)
        engine.encode(_TRIED)
        return engine
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # plain Exception, and what its Rust side panics with
        reason = " ".join(str(e).split())[:160]
        raise WeightsError(
            f"The tokenizer.json of {where} is not a tokenizer ({reason}); download it again."
        ) from e

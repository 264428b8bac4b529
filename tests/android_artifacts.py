"""Artifacts that the Android tests export: tiny random models of every family, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
from fake_artifact import TEMPLATE, _write_tokenizer
from tokenizers import Tokenizer

from edge_kv import runtime
from edge_kv.export import export_model

VOCAB = 272  # the toy tokenizer has an id for every byte
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "do_sample": True}


def export(
    name: str, root: Path, *, ctx: int, chunk: int = 8, kv: str = "f32", quant: str = "none",
    template: str = TEMPLATE, marks: tuple[str, ...] = (), sampling: dict[str, object] = SAMPLING,
    **fields: object,
) -> Path:  # fmt: skip
    """The tiny model `name` of `tiny_models` as an artifact; `fields` change its config."""
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    changes = {**ids, "max_position_embeddings": 4096, **fields}
    folder = root.with_name(f"{root.name}-checkpoint")
    made = tiny_models.tiny(name, **changes)
    made.save_pretrained(folder)
    _write_tokenizer(folder / "tokenizer.json", marks)
    (folder / "chat_template.jinja").write_text(template)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    broken = [i for i in range(VOCAB) if "\ufffd" in words.decode([i])]  # text reads back as it was
    said = {"eos_token_id": [1, 4], "suppress_tokens": broken, **sampling}
    (folder / "generation_config.json").write_text(json.dumps(said))
    export_model(
        weights=str(folder), ctx=ctx, chunk=chunk, kv=kv, quant=quant, calibration="none", out=root,
        open_session=runtime.load,
    )  # fmt: skip
    return root

"""What to do instead: answers to commands and arguments that belong somewhere else.

Somebody who used another tool types its words, or gives a checkpoint where an artifact is asked
for: each is answered with the command that does what was meant.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from edge_kv.artifact import MANIFEST, Artifact, read_artifact
from edge_kv.errors import ArtifactError, ConfigError

OTHER_WORDS = {
    "benchmark": "bench",
    "chat": "run",
    "convert": "export",
    "download": "export",
    "generate": "run",
    "info": "inspect",
    "ls": "list",
    "perplexity": "eval",
    "ppl": "eval",
    "ps": "list",
    "pull": "export",
    "push": "deploy",
    "quantize": "export",
    "rm": "cache",
    "server": "serve",
    "show": "inspect",
    "start": "serve",
    "test": "verify",
}
"""Commands of other tools, and the one here that does it."""


def command_for(word: str, commands: list[str]) -> str:
    """The command that `word` means, or the most similar one; empty when there is none."""
    meant = OTHER_WORDS.get(word.lower(), "")
    if meant in commands:
        return meant
    close = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=0.6)
    return close[0] if close else ""


def open_artifact(path: Path) -> Artifact:
    """`read_artifact`, saying what to do where `path` is something else that edge-kv knows.

    Raises:
        ArtifactError: as `read_artifact`, or naming the export that makes an artifact of it.
    """
    if not (path / MANIFEST).is_file():
        instead = _instead(path)
        if instead:
            raise ArtifactError(instead)
    return read_artifact(path)


def check_model(model: str | None, weights: str | None) -> None:
    """Refuse a file or a hub id given as --model, and an artifact given as --weights.

    Raises:
        ConfigError: naming the option that takes it.
    """
    if model and ("/" in model or model.lower().endswith(".gguf") or Path(model).is_dir()):
        raise ConfigError(
            f"--model takes the name of a preset, and {model!r} is a checkpoint: give it as "
            f"--weights {model}"
        )
    if weights and (Path(weights) / MANIFEST).is_file():
        raise ConfigError(
            f"{weights} is an artifact, exported already: run it with `edge-kv run {weights}`, or "
            "give the checkpoint it was made of as --weights."
        )


def _instead(path: Path) -> str:
    """What `path` is, if it is no artifact, and the command that makes one; empty if unknown."""
    from edge_kv.presets import PRESETS

    if path.is_file():
        if path.suffix.lower() == ".gguf" or _begins(path, b"GGUF"):
            return f"{path} is a checkpoint; export it first: {_export('--weights', path)}"
        return f"{path} is a file; give the directory that `edge-kv export` made."
    if path.is_dir():
        if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
            return f"{path} is a checkpoint; export it first: {_export('--weights', path)}"
        inside = sorted(p.parent.name for p in path.glob(f"*/{MANIFEST}"))
        if inside:
            return f"{path} holds artifacts ({', '.join(inside[:5])}); name one of them."
        return ""
    if str(path) in PRESETS:
        return f"{path} is a model, not an artifact; export it first: {_export('--model', path)}"
    return ""


def _export(option: str, path: Path) -> str:
    return f"edge-kv export {option} {path} --ctx 4096"


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(len(magic)) == magic
    except OSError:
        return False

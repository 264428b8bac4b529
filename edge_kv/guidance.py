"""What to do instead: answers to commands and arguments that belong somewhere else.

Somebody who used another tool types its words, or gives a checkpoint where an artifact is asked
for: each is answered with the command that does what was meant.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_kv.artifact import MANIFEST, Artifact, read_artifact
from edge_kv.errors import ArtifactError, ConfigError

OTHER_WORDS = {
    "benchmark": "bench",
    "chat": "run",
    "convert": "export",
    "download": "export",
    "generate": "run",
    "help": "--help",
    "install": "export",
    "models": "list",
    "version": "--version",
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
    if meant in commands or meant.startswith("--"):
        return meant
    close = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=0.6)
    return close[0] if close else ""


OTHER_OPTIONS = {
    "-c": "--ctx", "--ctx-size": "--ctx", "--context": "--ctx", "--n-ctx": "--ctx",
    "--context-length": "--ctx", "--num-ctx": "--ctx", "--max-model-len": "--ctx",
    "-n": "--max-new-tokens", "--n-predict": "--max-new-tokens",
    "--num-predict": "--max-new-tokens", "--max-tokens": "--max-new-tokens",
    "-t": "--threads", "--num-threads": "--threads", "--temp": "--temperature",
    "-f": "--file", "--prompt-file": "--file", "--system-prompt": "--system",
    "-o": "--out", "--output": "--out", "--output-dir": "--out", "--outfile": "--out",
    "-q": "--quant", "--quantize": "--quant", "--quantization": "--quant", "--outtype": "--quant",
    "--dtype": "--quant", "--precision": "--quant", "--cache-type-k": "--kv",
    "--kv-cache-dtype": "--kv", "-m": "--model", "--model-id": "--weights",
    "--checkpoint": "--weights", "--gguf": "--weights", "--memory": "--ram-limit",
    "--repeat-penalty": "--repetition-penalty", "--batch-size": "--chunk",
    "--ubatch-size": "--chunk",
    "-p": "--prompt", "--backends": "--backend", "--runtime": "--engine", "--ctx": "--ctx",
    "--model": "--model", "--weights": "--weights", "--hf-repo": "--weights", "-hf": "--weights",
    "--model-path": "--weights", "--model-name-or-path": "--weights",
    "--system-message": "--system",
    "--ngram": "--drafts", "--draft-max": "--drafts", "--max-memory": "--ram-limit",
    "--schema": "--json-schema", "--format": "--json-schema", "--rp": "--repetition-penalty",
}  # fmt: skip
"""Options of other tools, and the one here that does it."""
_PARSER_SAYS = {  # what the parser says -> in words
    "Input should be a valid integer, unable to parse string as an integer":
    "it takes a whole number",
    "Input should be a valid number, unable to parse string as a number": "it takes a number",
    "Input should be greater than or equal to": "it must be at least",
    "Input should be less than or equal to": "it must be at most",
    "requires an argument": "needs a value",
}  # fmt: skip
_ASKS = {  # what a command lacks -> what to say
    "artifact": "Name an artifact, the directory that `edge-kv export` made; `edge-kv list` shows "
    "those that are here.",
    "ctx": "Say how much context to prepare for: --ctx 32768 (or 4k, 32k).",
    "text": "Name a text to predict: --text FILE.",
}
_CPU, _CONVERSES = "everything runs on the CPU", "without a prompt, `run` converses"
_TELLS, _STREAMS = "`bench` and `run --json` tell more", "text always streams"
_ONE_WAY = "there is one way of attention"
_NEITHER = {  # options that the command does not have -> why
    "--n-gpu-layers": _CPU, "--gpu-layers": _CPU, "-ngl": _CPU, "--gpu": _CPU, "--device": _CPU,
    "--cuda": _CPU, "-fa": _ONE_WAY, "--flash-attn": _ONE_WAY, "-i": _CONVERSES, "-cnv": _CONVERSES,
    "--interactive": _CONVERSES, "--chat": _CONVERSES, "--conversation": _CONVERSES,
    "-y": "nothing here asks", "-v": _TELLS, "--verbose": _TELLS, "--stream": _STREAMS,
    "--no-stream": _STREAMS,
}  # fmt: skip


def usage_advice(
    command: str, options: Sequence[str], message: str, *, unknown: str = "", lacks: str = "",
    extra: Sequence[str] = (), given: str = "", named: bool = False, elsewhere: str = "",
) -> str:  # fmt: skip
    """One sentence for a command line that cannot be understood.

    Args:
        command: `run`, or "" before any command.
        options: those of the command.
        message: what the parser says; used where nothing better is known.
        unknown: an option the command does not have.
        lacks: the name of an argument or option that is missing.
        extra: words beyond the arguments the command takes.
        given: the artifact that was named.
        named: whether a model was named.
        elsewhere: a command that has the unknown option, where none was named before it.
    """
    if elsewhere:
        return f"{unknown} follows the command it is of: edge-kv {elsewhere} … {unknown} …"
    if unknown:
        return _instead_of(command, options, unknown)
    if lacks in _ASKS:
        return _ASKS[lacks]
    if extra and command == "run" and extra[0].endswith(".json"):
        return (
            f"--json of `edge-kv run` takes no file: it prints the document, so write > {extra[0]} "
            "behind the command."
        )
    if extra and command == "run":
        words = " ".join(extra)
        return (
            f"The prompt is more than one word ({words!r} is left over); put it in quotes: "
            f"edge-kv run {given} 'a prompt of several words'"
        )
    if extra and command in ("plan", "export") and not named:
        option = "--weights" if _is_checkpoint(extra[0]) else "--model"
        return f"A model is named with {option}: edge-kv {command} {option} {extra[0]} --ctx 4096"
    if command == "cache" and extra and extra[0] in ("clear", "clean", "rm", "prune"):
        return "What is kept is removed with `edge-kv cache --clear`."
    if extra:
        return f"{' '.join(extra)!r} is too much; `edge-kv {command} --help` shows what it takes."
    if closed := re.search(r"path '(.*)' is not readable", message):
        return f"{closed[1]} cannot be read (permission denied); look at its permissions."
    for technical, plain in _PARSER_SAYS.items():
        message = message.replace(technical, plain)
    help_line = " ".join(["edge-kv", *([command] if command else []), "--help"])
    return f"{message.rstrip('.')}; `{help_line}` shows how."


def whole_option(letter: str, words: Sequence[str]) -> str:
    """The option of several letters, such as -ngl, of which a parser took one: `letter`."""
    known = (w for w in words if w in OTHER_OPTIONS or w in _NEITHER)
    return next((w for w in known if w[1] != "-" and letter[1] in w), letter)


def _instead_of(command: str, options: Sequence[str], unknown: str) -> str:
    where = f"`edge-kv {command}`" if command else "`edge-kv` itself"
    meant = OTHER_OPTIONS.get(unknown, "")
    if unknown in _NEITHER:
        return f"There is no option {unknown}: {_NEITHER[unknown]}."
    if command == "run" and unknown in ("-p", "--prompt"):
        return f"There is no option {unknown}: the prompt follows the artifact, in quotes."
    if meant in ("--model", "--weights") and meant not in options and command:
        return (
            f"There is no option {unknown}: {where} takes the directory that `edge-kv export` made "
            "as its first argument."
        )
    if meant == "--ctx" and "--ctx" not in options and command:
        return (
            f"There is no option {unknown} of {where}: how much context there is was chosen when "
            "the artifact was exported (--ctx)."
        )
    if meant not in options:
        close = difflib.get_close_matches(unknown, options, n=1, cutoff=0.7)
        meant = close[0] if close else ""
    if meant:
        return f"There is no option {unknown} of {where}. Did you mean {meant}?"
    help_line = " ".join(["edge-kv", *([command] if command else []), "--help"])
    return f"There is no option {unknown} of {where}; `{help_line}` lists them."


def model_meant(name: str, hub_ids: Mapping[str, str]) -> str:
    """The row that `name` means: another spelling of it, or of its repository; "" if none.

    `hub_ids` are the rows with their repositories.
    """
    wanted = _letters(name)
    for row, hub_id in hub_ids.items():
        if wanted in (_letters(row), _letters(hub_id), _letters(hub_id.rpartition("/")[2])):
            return row
    inside = [row for row in hub_ids if len(row) > 2 and _letters(row) in wanted]
    return max(inside, key=len, default="")


def _letters(name: str) -> str:
    """`name` without case, marks between its parts, and what marks a tuned model."""
    plain = name.lower()
    for ending in ("-it", "-instruct", "-chat"):
        plain = plain.removesuffix(ending)
    return "".join(c for c in plain if c.isalnum())


def _is_checkpoint(word: str) -> bool:
    path = Path(word)
    return "/" in word or path.suffix.lower() == ".gguf" or path.exists()


def open_artifact(path: Path, command: str = "", behind: str = "") -> Artifact:
    """`read_artifact`, saying what to do where `path` is something else that edge-kv knows.

    `behind` is what follows it on the line of `command`, which may be the artifact that was meant.

    Raises:
        ArtifactError: as `read_artifact`, or naming the export that makes an artifact of it.
    """
    if not (path / MANIFEST).is_file():
        if behind and os.path.isfile(os.path.join(behind, MANIFEST)):  # False for any text
            raise ArtifactError(
                f"The artifact comes first: edge-kv {command} {behind} {shlex.quote(str(path))}"
            )
        instead = _instead(path)
        if instead:
            raise ArtifactError(instead)
    return read_artifact(path)


def check_model(model: str | None, weights: str | None) -> None:
    """Refuse a file or a hub id given as --model, and an artifact given as --weights.

    A preset stays one where a folder has its name, as the artifacts of our own examples do.

    Raises:
        ConfigError: naming the option that takes it.
    """
    from edge_kv import models

    if model and model not in models.ROWS and _is_checkpoint(model):
        raise ConfigError(
            f"--model takes the name of a preset, and {model!r} is a checkpoint: give it as "
            f"--weights {model}"
        )
    if weights in models.ROWS and not Path(weights).exists():
        raise ConfigError(f"{weights} is a preset: name it with --model {weights}")
    if weights and (Path(weights) / MANIFEST).is_file():
        raise ConfigError(
            f"{weights} is an artifact, exported already: run it with `edge-kv run {weights}`, or "
            "give the checkpoint it was made of as --weights."
        )


def _instead(path: Path) -> str:
    """What `path` is, if it is no artifact, and the command that makes one; empty if unknown."""
    from edge_kv import models

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
    if str(path) in models.ROWS:
        return f"{path} is a model, not an artifact; export it first: {_export('--model', path)}"
    return "" if path.exists() else _nothing(path)


def _nothing(path: Path) -> str:
    """What to say of a name behind which there is nothing: what may have been meant."""
    from edge_kv import models
    from edge_kv.weights.hub import is_hub_id

    here = sorted(p.parent.name for p in path.parent.glob(f"*/{MANIFEST}"))
    close = difflib.get_close_matches(path.name, here, n=1, cutoff=0.6)
    if close:
        return f"There is no artifact {path}. Did you mean {path.parent / close[0]}?"
    if is_hub_id(str(path)):
        return (
            f"There is no directory {path}; if it is a model of the Hugging Face hub, export it "
            f"first: {_export('--weights', path)}"
        )
    row = model_meant(path.name, {name: row.hub_id for name, row in models.ROWS.items()})
    if row:
        return (
            f"There is no artifact {path}; export the model {row} first: "
            f"{_export('--model', Path(row))}"
        )
    return ""


def _export(option: str, path: Path) -> str:
    return f"edge-kv export {option} {path} --ctx 4096"


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(len(magic)) == magic
    except OSError:
        return False

"""edge_kv.runtime: run an artifact with numpy and one engine; never imports torch.

from edge_kv.runtime import generate, load

with load("e2b-32768") as session:
    for token in generate(session, ids, max_new_tokens=64):
        ...
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_kv.artifact import Artifact
    from edge_kv.runtime.chat import Chat, Generator, Options, Reply, Turn
    from edge_kv.runtime.generation import Slide, generate
    from edge_kv.runtime.messages import Message, Tool, ToolCall
    from edge_kv.runtime.meter import Memory, read_memory, reset_peak
    from edge_kv.runtime.replies import Piece
    from edge_kv.runtime.sampling import Sampler, Sampling
    from edge_kv.runtime.session import Session, Stats
    from edge_kv.runtime.template import Template
    from edge_kv.runtime.text import TextStream, Tokenizer

__all__ = [
    "ENGINES",
    "Chat",
    "Generator",
    "Memory",
    "Message",
    "Options",
    "Piece",
    "Reply",
    "Sampler",
    "Sampling",
    "Session",
    "Slide",
    "Stats",
    "Template",
    "TextStream",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "Turn",
    "generate",
    "load",
    "read_memory",
    "reset_peak",
]

# Engine -> its module and session class, imported when an artifact is loaded with it, and the
# backend whose programs it runs.
ENGINES = {
    "onnx": ("edge_kv.runtime.onnx_session", "OnnxSession", "onnx"),
    "onnx-stock": ("edge_kv.runtime.onnx_session", "OnnxStockSession", "onnx"),
    "executorch": ("edge_kv.runtime.executorch_session", "ExecuTorchSession", "executorch"),
    "executorch-python": (
        "edge_kv.runtime.executorch_python", "ExecuTorchPythonSession", "executorch",
    ),
}  # fmt: skip

_HOMES = {
    "Chat": "chat",
    "Generator": "chat",
    "Memory": "meter",
    "Message": "messages",
    "Options": "chat",
    "Piece": "replies",
    "Reply": "chat",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "Session": "session",
    "Slide": "generation",
    "Stats": "session",
    "Template": "template",
    "TextStream": "text",
    "Tokenizer": "text",
    "Tool": "messages",
    "ToolCall": "messages",
    "Turn": "chat",
    "generate": "generation",
    "read_memory": "meter",
    "reset_peak": "meter",
}


def load(
    path: str | Path | Artifact,
    engine: str = "onnx",
    threads: int | None = None,
    cache: bool = True,
    huge_pages: bool = False,
) -> Session:
    """Open an artifact directory and start a session on `engine`.

    `threads` defaults to the physical cores this process may use. `cache` lets the engine keep
    weights packed for this device in a cache directory: the first load takes longer, later ones
    map the packed weights instead of building them on the heap. `huge_pages` copies the weights
    that a token reads into memory with huge pages, where the system has them and enough memory:
    decoding is faster, loading slower, and the copy, as large as the weights, cannot be dropped.

    Raises:
        ConfigError: an unknown engine; the message names the closest one.
        ArtifactError: not an artifact, damaged, or exported without programs for `engine`.
        MemoryLimitError: the weights do not fit.
    """
    from edge_kv.artifact import Artifact, read_artifact
    from edge_kv.runtime.mapped import let_go_of_code

    artifact = path if isinstance(path, Artifact) else read_artifact(path)
    check_engine(artifact, engine)
    module, name, _ = ENGINES[engine]
    session: Session = getattr(import_module(module), name)(artifact, threads=threads, cache=cache)
    if huge_pages:
        session.use_huge_pages()
    let_go_of_code()
    return session


def check_engine(artifact: Artifact, engine: str) -> None:
    """Refuse an engine that cannot run `artifact`, before its libraries are imported.

    Raises:
        ConfigError: an unknown engine; the message names the closest one.
        ArtifactError: exported without programs for it.
    """
    from edge_kv.errors import ConfigError, did_you_mean

    if engine not in ENGINES:
        raise ConfigError(f"Unknown engine {engine!r}.{did_you_mean(engine, ENGINES)}")
    artifact.backend(ENGINES[engine][2])


def __getattr__(name: str) -> Any:
    """Public names, each imported from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

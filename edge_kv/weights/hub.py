"""A Hugging Face hub id: downloaded (or found in the local cache), then read like any directory."""

from __future__ import annotations

from pathlib import Path

from edge_kv.errors import WeightsError
from edge_kv.weights.source import WeightSource

_ALTERNATIVES = (
    "give a local directory with config.json and safetensors, a .gguf file, or `random` (seeded, "
    "full size)"
)


def open_hub(repo: str) -> WeightSource:
    """Weights of the hub repository `org/name`, with huggingface_hub's own progress bar.

    A repository without config.json is taken for its GGUF file, if it has exactly one.

    Raises:
        WeightsError: the hub cannot be reached, the repository is not there or not open to you,
            or it holds nothing edge-kv reads; the message names the alternatives.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    except ImportError as e:
        raise WeightsError(
            f"{repo!r} is not a local path and hub downloads need huggingface_hub: "
            f"pip install 'edge-kv[export]', or {_ALTERNATIVES}."
        ) from e
    try:
        root = Path(
            snapshot_download(
                repo,
                allow_patterns=["*.json", "*.jinja", "*.safetensors"],
                ignore_patterns=["*/*"],  # other formats keep copies in folders
            )
        )
        if (root / "config.json").is_file():
            from edge_kv.weights.hf import HFDirectory

            return HFDirectory(root, f"hub {repo}")
        ggufs = [f for f in HfApi().list_repo_files(repo) if f.endswith(".gguf")]
        if len(ggufs) == 1:
            from edge_kv.weights.gguf_model import GGUFModel

            return GGUFModel(Path(hf_hub_download(repo, ggufs[0])), f"hub {repo}")
    except WeightsError:
        raise
    except Exception as e:  # the hub client raises errors of several libraries
        reason = " ".join(str(e).split())[:160]
        raise WeightsError(
            f"{repo!r} is not a local path and the hub cannot provide it "
            f"({type(e).__name__}: {reason}); {_ALTERNATIVES}."
        ) from e
    raise WeightsError(
        f"The hub repository {repo!r} has no config.json and {len(ggufs)} GGUF files "
        f"({', '.join(ggufs[:5]) or 'none'}); download one and give its path."
    )

"""The Hugging Face hub: what a repository holds, brought into its local cache.

Files come one after the other into the hub client's own cache; a large one that was cut off or
killed goes on where it stopped. What the hub refuses is said in one sentence, with what to do.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from edge_kv.amounts import size
from edge_kv.errors import WeightsError
from edge_kv.files import locked
from edge_kv.progress import Progress, Silent
from edge_kv.weights.source import TOOL_USE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONFIG = "config.json"
READ = (".json", ".jinja", ".safetensors")  # of a checkpoint: files at the top of a repository
_log = logging.getLogger(__name__)


def is_hub_id(spec: str) -> bool:
    """Whether `--weights` names a hub repository: `org/name`, and no path that exists here."""
    path = Path(spec).expanduser()
    return bool(HUB_ID.fullmatch(spec)) and path.suffix.lower() != ".gguf" and not path.exists()


@dataclass(frozen=True)
class Repository:
    """A repository at one revision: its files and their sizes in bytes, 0 where not told."""

    name: str
    commit: str
    files: dict[str, int]

    @property
    def checkpoint(self) -> list[str]:
        """The files of a checkpoint in Hugging Face's layout; other formats lie in folders."""
        top = [f for f in self.files if PurePosixPath(f).suffix in READ and "/" not in f]
        return top + [f for f in self.files if f == TOOL_USE]

    def gguf(self) -> list[str]:
        """The parts of its only GGUF model, the first one first.

        Raises:
            WeightsError: there is none, or there are several to choose from.
        """
        found: dict[str, list[str]] = {}
        for file in sorted(f for f in self.files if f.lower().endswith(".gguf")):
            if _PROJECTOR not in file.lower():
                found.setdefault(_PART.sub("", file), []).append(file)
        if len(found) == 1:
            return next(iter(found.values()))
        raise WeightsError(
            f"The hub repository {self.name!r} has no {CONFIG} and {len(found)} GGUF models "
            f"({', '.join(list(found)[:5]) or 'none'}); download one and give its path."
        )


_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PROJECTOR = "mmproj"  # a vision tower beside the model, in a file of its own


def download(
    repo: str, revision: str | None = None, *, config_only: bool = False,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Bring the hub repository `repo` here; returns its directory, or the path of its GGUF model.

    Without a network, what an earlier download left in the cache is used.

    Args:
        revision: a branch, tag or commit; the newest state of the main branch when left out.
        config_only: only what describes the model (`config.json`), for planning.
        progress: told of every piece, in bytes of all files together.

    Raises:
        WeightsError: the hub cannot be reached, the repository or revision is not there or not open
            to you, the disk is full, or nothing in it is read by edge-kv.
    """
    _require_client(repo)
    with _explained(repo, revision):
        found = _look(repo, revision)
        if isinstance(found, Path):
            return found
        if CONFIG in found.files:
            names = [CONFIG] if config_only else found.checkpoint
            return _fetch(found, names, revision, progress or Silent())[0].parent
        parts = found.gguf()
        if config_only:
            raise WeightsError(
                f"{repo} holds a GGUF file and no {CONFIG}, so its plan needs the file itself; "
                f"download it (hf download {repo} {parts[0]}) and give its path as --weights."
            )
        return _fetch(found, parts, revision, progress or Silent())[0]


def _require_client(repo: str) -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        raise WeightsError(
            f"{repo!r} is not a local path, and downloads from the hub need huggingface_hub; in "
            "the checkout, run: pip install '.[export]'"
        ) from e


def _look(repo: str, revision: str | None) -> Repository | Path:
    """What the hub says of the repository; without a network, what the cache holds of it."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as e:
        held = _cached(repo, revision) if _unreachable(e) else None
        if held is None:
            raise
        _log.info("The hub cannot be reached; using what its cache holds of %s.", repo)
        return held
    files = {f.rfilename: f.size or 0 for f in info.siblings or ()}
    return Repository(repo, str(info.sha), files)


def _cached(repo: str, revision: str | None) -> Path | None:
    """What `download` returned before, if the cache still holds it."""
    folder, name = _folder(repo), revision or "main"
    try:
        commit = (folder / "refs" / name).read_text().strip()
    except OSError:
        commit = name
    root = folder / "snapshots" / commit
    if (root / CONFIG).is_file():
        return root
    held = [p.name for p in root.glob("*") if p.suffix.lower() == ".gguf"]
    return root / Repository(repo, commit, dict.fromkeys(held, 0)).gguf()[0] if held else None


def _folder(repo: str) -> Path:
    """Where the hub's client keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _fetch(
    found: Repository, names: list[str], revision: str | None, progress: Progress
) -> list[Path]:
    """Bring `names` into the cache, one after the other; returns where they are."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    def held(name: str) -> bool:
        return isinstance(try_to_load_from_cache(found.name, name, revision=found.commit), str)

    missing = [name for name in names if not held(name)]
    total = sum(found.files[name] for name in missing)
    _check_space(found.name, total, Path(constants.HF_HUB_CACHE))
    if total > _WORTH_SAYING:
        _log.info("Downloading %s: %s in %d files.", found.name, size(total), len(missing))
        progress.stage("download")
    done = 0
    for name in missing:
        if found.files[name] > _SMALL:
            _bring(found, name, lambda n, at=done, of=name: progress.advance(of, at + n, total))  # type: ignore[misc]
        hf_hub_download(found.name, name, revision=found.commit)
        done += found.files[name]
        progress.advance(name, done, total)
    held_now = [Path(hf_hub_download(found.name, name, revision=found.commit)) for name in names]
    hf_hub_download(found.name, names[0], revision=revision)  # notes which commit that is
    return held_now


def _bring(found: Repository, name: str, told: Callable[[int], None]) -> None:
    """Put a large file where the hub's client looks for it, going on with what is there of it.

    The client itself starts anew after a kill. `told` hears how many bytes are there.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    about = get_hf_file_metadata(hf_hub_url(found.name, name, revision=found.commit))
    if not about.etag or not about.size:
        return
    blob = _folder(found.name) / "blobs" / about.etag
    part = blob.with_name(f"{about.etag}.edge-kv")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with locked(part.with_suffix(".lock")):
        if blob.exists():
            return
        digest = hashlib.sha256()
        with part.open("ab+") as f:
            f.seek(0)
            while block := f.read(_BLOCK):
                digest.update(block)
            _append(found.name, about.location, f, about.size, digest, told)
        if len(about.etag) == _SHA256 and digest.hexdigest() != about.etag:
            part.unlink()
            raise WeightsError(
                f"{name} of {found.name} arrived with SHA-256 {digest.hexdigest()}, the hub says "
                f"{about.etag}; run the same command again, it fetches the file anew."
            )
        part.replace(blob)
    part.with_suffix(".lock").unlink(missing_ok=True)


def _append(
    repo: str, url: str, f: BinaryIO, whole: int, digest: Any, told: Callable[[int], None]
) -> None:
    """Append to `f` what it lacks of the `whole` bytes at `url`; a broken transfer goes on."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    ours = urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc
    headers = build_hf_headers() if ours else {}  # a token is not for other hosts
    there, left = f.tell(), _TRIES
    while there < whole:
        began = there
        try:
            asked = {**headers, "Range": f"bytes={there}-", "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=asked, follow_redirects=True) as answer:
                hf_raise_for_status(answer)
                if there and answer.status_code != _PARTIAL:
                    raise WeightsError(
                        f"The hub gives {repo} only as a whole, and part of it is here already; "
                        f"remove {f.name} and run the same command again."
                    )
                for block in answer.iter_raw():
                    f.write(block)
                    digest.update(block)
                    there += len(block)
                    told(there)
        except Exception as e:
            left = _TRIES if there > began else left - 1
            if not (_unreachable(e) or _cut(e)) or not left:
                raise
            time.sleep(_PAUSE)


_SMALL = 1 << 20  # bytes of a file that is fetched in one go
_BLOCK = 1 << 20
_SHA256 = 64  # hex digits
_PARTIAL = 206
_TRIES, _PAUSE = 5, 1.0  # transfers that bring nothing before it is given up; seconds between
_WORTH_SAYING = 1 << 20  # bytes of a download that is announced
_SPARE = 64 << 20  # bytes a disk keeps


def _check_space(repo: str, needed: int, cache: Path) -> None:
    there = next((p for p in (cache, *cache.parents) if p.exists()), None)
    if there is None:
        return
    free = shutil.disk_usage(there).free
    if needed + _SPARE > free:
        raise WeightsError(
            f"{repo} takes {size(needed)} and the disk of {there} has {size(free)} left; free "
            "some space, or set HF_HOME to a directory on another disk."
        )


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub client, which are those of several libraries, as one sentence each."""
    from huggingface_hub import utils

    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.CRITICAL)  # it says again what is said here
    utils.disable_progress_bars()
    try:
        yield
    except WeightsError:
        raise
    except Exception as e:
        raise WeightsError(_sentence(repo, revision, e)) from e
    finally:
        client.setLevel(level)
        utils.enable_progress_bars()


def _unreachable(error: BaseException) -> bool:
    """Whether nothing answered: no network, offline mode, or a server that is down."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {c.__name__ for e in _chain(error) for c in type(e).__mro__}
    return bool(
        names & {"OfflineModeIsEnabled", "TransportError", "ConnectError", "TimeoutException"}
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sentence(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    status = next((s for e in _chain(error) if (s := _status(e))), 0)
    token = "set a token of that account (hf auth login, or HF_TOKEN=…)"
    if get_token():
        token = "check that your token is of that account"

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(e, kind) for e in _chain(error))

    if is_a(GatedRepoError):
        return f"{repo} is gated: accept its licence at {page}, then {token} and try again."
    if is_a(DisabledRepoError):
        return f"The hub has disabled {repo}; look at {page}, and choose another checkpoint."
    if is_a(RevisionNotFoundError):
        return (
            f"{repo} has no revision {revision!r}; leave --revision out for its newest state, or "
            f"choose one at {page}/commits/main."
        )
    if is_a(RepositoryNotFoundError):
        return (
            f"The hub has no repository {repo!r} that is open to you; check the name, or, if it is "
            "private, set a token that may read it (hf auth login, or HF_TOKEN=…)."
        )
    if status == 401:
        return "The hub does not know your token; set a valid one (hf auth login, or HF_TOKEN=…)."
    if status == 403:
        return (
            f"Your token may not read {repo}: accept the licence at {page}, and allow the token to "
            f"read gated repositories at {constants.ENDPOINT}/settings/tokens."
        )
    if status == 404:
        return f"The hub answers 404 for {repo}; check the name at {page}."
    if status == 429:
        return f"The hub answers 429 (too many requests) for {repo}; wait some minutes, try again."
    if status >= 500:
        return (
            f"The hub answers {status} for {repo}: it is down or busy; run the same command again "
            "later, it goes on where it stopped."
        )
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in _chain(error)):
        return (
            f"The disk is full while downloading {repo}; free some space, or set HF_HOME to a "
            "directory on another disk, and run the same command again."
        )
    reason = " ".join(str(error).split())[:160]
    if _unreachable(error) and not _cut(error):
        return (
            f"{repo!r} is not a local path, and the hub ({constants.ENDPOINT}) cannot be reached; "
            "check the connection, or give a local directory, a .gguf file or `random`."
        )
    if _cut(error):
        return (
            f"The connection to the hub broke while downloading {repo}; run the same command "
            "again, it goes on where it stopped."
        )
    return f"The hub cannot provide {repo!r} ({type(error).__name__}: {reason})."


def _status(error: BaseException) -> int:
    """The HTTP status of an error that has one, else 0."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _cut(error: BaseException) -> bool:
    """Whether a transfer began and ended too early."""
    return any(
        type(e).__name__ in ("RemoteProtocolError", "ReadTimeout", "ReadError", "IncompleteRead")
        or "Consistency check failed" in str(e)
        for e in _chain(error)
    )

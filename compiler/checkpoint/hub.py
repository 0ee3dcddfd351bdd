"""Files of a checkpoint from a model hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moec.compiler.checkpoint.record import TensorEntry
from moec.errors import CheckpointError, MissingDependencyError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be a hub id, ``owner/name``."""
    return len(name) <= 96 and _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def download(repo: str, revision: str | None, needed: Sequence[str], wished: Sequence[str] = ()) -> Path:
    """Bring the files of ``repo`` that match the patterns into the cache; the snapshot's folder.

    ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` mean what they mean to huggingface_hub.
    What is in the cache already is used when the hub cannot be reached, also if it lacks ``wished`` files.

    Raises:
        NetworkError: the hub cannot be reached and the cache does not have the needed files.
        CheckpointError: the hub has no such model, or does not let this user have it.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            "huggingface_hub is not installed.", str(error), "Run: pip install 'moec[compile]'."
        ) from error
    incomplete = getattr(errors, "IncompleteSnapshotError", errors.LocalEntryNotFoundError)
    with _asking(repo, revision):
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[*needed, *wished]))
        except incomplete:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(needed)))


def read_headers(repo: str, revision: str | None) -> dict[str, TensorEntry]:
    """The tensors of ``repo`` by name, from the headers of its safetensors files; no weight is fetched.

    Raises:
        NetworkError: the hub cannot be reached.
        CheckpointError: the hub has no such model with safetensors files, or does not let this user have it.
    """
    from huggingface_hub import errors, get_safetensors_metadata

    with _asking(repo, revision):
        try:
            found = get_safetensors_metadata(repo, revision=revision)
        except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
            raise CheckpointError(
                f"The hub's {repo} has no tensors that can be listed.",
                _first(error),
                "Download the model and give its folder.",
            ) from error
    return {
        name: TensorEntry(Path(file), info.dtype, tuple(info.shape), *info.data_offsets)
        for file, header in found.files_metadata.items()
        for name, info in header.tensors.items()
    }


@contextmanager
def _asking(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of ours."""
    from huggingface_hub import errors

    at = f"{repo} at revision {revision}" if revision else repo
    # The bases are OSError and the HTTP library's own error, whichever library this version uses.
    failures = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"The hub does not give {at} to you.", _first(error), "Accept its terms, then run: hf auth login."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"The hub has no model {at}.", _first(error), "Check the name, or run: hf auth login."
        ) from error
    except cast("tuple[type[Exception], ...]", failures) as error:
        raise NetworkError(
            f"Cannot get {at} from the hub, and the cache does not have it.",
            _first(error),
            "Check the network and HF_HUB_OFFLINE, or pass the folder of a local copy.",
        ) from error


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:300]

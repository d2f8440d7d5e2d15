"""Models of the Hugging Face hub, through its own client and that client's cache."""

from __future__ import annotations

from pathlib import Path

from core.errors import NotFound, Unavailable

# What we read of a repository, and no pickled weights.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja"]


def fetch_from_hub(spec: str) -> Path:
    """Returns the local folder of `org/name[@revision]`, or the file of `org/name/file.gguf`.

    The client shows its own progress and reads its own settings (HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE). Raises NotFound or Unavailable.
    """
    # Imported here: it takes half a second, and most users never need it.
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    name, _, revision = spec.partition("@")
    repository = "/".join(name.split("/")[:2])
    file_name = name[len(repository) + 1 :]
    wanted_revision = revision or None
    try:
        if file_name:
            return Path(hf_hub_download(repository, file_name, revision=wanted_revision))
        return Path(
            snapshot_download(repository, revision=wanted_revision, allow_patterns=_WANTED_FILES)
        )
    except errors.GatedRepoError as error:
        raise NotFound(
            f"{repository} is open only to those who accepted its terms on the hub; set HF_TOKEN"
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise NotFound(f"the hub has no {spec!r}, or it is private (set HF_TOKEN)") from error
    except (
        errors.LocalEntryNotFoundError,
        errors.HfHubHTTPError,
        errors.XetDownloadError,
        OSError,
    ) as error:
        raise Unavailable(
            f"{spec!r} is not in the hub's local cache, and the hub could not be reached",
            retry_after_s=None,
        ) from error

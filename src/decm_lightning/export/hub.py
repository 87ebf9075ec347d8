"""Upload an export to the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from decm_lightning.export.card import CARD
from decm_lightning.networks.hub import HUB_NAME


def check_name(name: str) -> str:
    """Return a name on the hub if it has the form user/name."""
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"push must be user/name, a name on the Hugging Face hub: got {name!r}")
    return name


def push(out: Path, files: Sequence[Path], name: str, public: bool = False) -> str:
    """Upload the files of an export in one commit, and return the address of the repository.

    A repository that does not exist is created, private unless `public`. An existing one keeps its visibility. The card
    becomes README.md. Nothing else in the folder is uploaded.

    Raises:
        OSError: in one line, if the hub cannot be reached or refuses the upload. The local files stay.
    """
    # Imported here: only pushing needs them.
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    failed = f"{out} is written, but cannot be pushed to {name}"
    if get_token() is None:
        raise OSError(f"{failed}: no token (run hf auth login, or set HF_TOKEN)")
    root = out if out.is_dir() else out.parent
    names = {file: CARD if file.suffix == ".md" else file.relative_to(root).as_posix() for file in files}
    api = HfApi(library_name="decm-lightning")
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(path, file) for file, path in names.items()]
        api.create_commit(name, operations, commit_message=f"Upload {out.name}")
    # httpx.HTTPError and OSError: huggingface_hub's versions use different modules for httpx.
    except HfHubHTTPError.__bases__ as error:  # type: ignore[misc]
        raise OSError(f"{failed}: {' '.join(str(error).split())}") from error
    return str(url)

"""The Hugging Face Hub, asked once before a library asks it six times: what is not there is said at once."""

from pathlib import Path

import timm
from huggingface_hub import HfApi, try_to_load_from_cache

SCHEMES = ("hf-hub:", "hf_hub:")
"""How timm's names of models on the Hub begin."""


def missing_on_hub(repository: str, file: str) -> str | None:
    """Why a file can be had neither from the cache nor from the Hub; None if it can.

    Args:
        repository: ``user/name`` or ``user/name@revision``.
        file: such as ``config.json``.
    """
    name, _, revision = repository.partition("@")
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision or None), str):
            return None
        if HfApi().file_exists(name, file, revision=revision or None):
            return None
    except Exception as problem:  # whatever HTTP library is below raises its own
        return str(problem).partition("\n")[0] or type(problem).__name__
    return f"there is no {file} of {repository}, or it needs a token (huggingface-cli login)"


def missing_published(name: str) -> str | None:
    """Why the weights that timm knows by ``name`` cannot be had from the Hub; None if they can or lie elsewhere."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    whole = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    repository = f"{cfg.hf_hub_id}{whole}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id
    return missing_on_hub(repository, cfg.hf_hub_filename or "model.safetensors")


def upload(folder: Path, name: str) -> str:
    """Uploads a folder to the Hub, into a private repository unless there is one; returns its address.

    Raises:
        ConnectionError: if the Hub does not take it: no network, no token, no such user.
    """
    try:
        api = HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add model")
    except Exception as problem:  # whatever HTTP library is below raises its own
        raise ConnectionError(str(problem).strip().partition("\n")[0] or type(problem).__name__) from problem
    return str(repository)

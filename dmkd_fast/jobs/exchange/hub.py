"""Push an exported classifier to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from dmkd_fast.runtime.errors import UserError, invalid, one_line


def check_repository(name: str) -> None:
    """Refuse a name that is not OWNER/NAME.

    Raises:
        UserError: The Hub would not accept the name.
    """
    if not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name, re.ASCII):
        raise invalid("--push", f"{name!r:.80}", "OWNER/NAME of a repository on the Hub")


def push(folder: Path, name: str) -> str:
    """Upload a folder as one commit to a model repository, which is made if needed.

    The Hub's own log-in is used: `hf auth login` or HF_TOKEN; HF_ENDPOINT names another server.

    Args:
        folder: Folder to upload.
        name: Repository, OWNER/NAME.

    Returns:
        Address of the commit.

    Raises:
        UserError: The Hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        info = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export by dmkd_fast"
        )
    except Exception as error:  # the client raises those of its HTTP library as well
        raise UserError(
            f"--push: {name}: {one_line(error)}; {folder} is complete: after a log-in (hf auth "
            f"login) push it with: hf upload {name} {folder}"
        ) from None
    return str(info.commit_url)

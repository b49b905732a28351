"""Upload an exported folder to the Hugging Face Hub with the token of `hf auth login`, which is never printed."""

import re
from pathlib import Path
from typing import Any

from training.errors import UserError, one_line

TOKEN = re.compile(r"\b(hf|api_org)_\w+")


def open_hub(name: str) -> Any:
    """The Hub's client, after a look at the name of the repository; nothing is sent.

    Raises:
        UserError: no `huggingface_hub`, or no name that a repository may have.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in __all__ (1.23)
    except ImportError:
        raise UserError("--push: wants the package huggingface_hub; pip install tiny-onn-func[hf]") from None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push: expected OWNER/NAME, got {name!r}: {one_line(error)[:200]}") from None
    return HfApi()


def push_folder(api: Any, folder: Path, name: str) -> str:
    """Upload a folder as the model `name`, which is made if it is not there; returns its address.

    Raises:
        UserError: the Hub does not answer, or refuses: no token, no right.
    """
    try:
        address = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="model", folder_path=folder, commit_message="Export of tiny-onn")
    except Exception as error:  # of httpx, huggingface_hub and the system, with no common class
        came = TOKEN.sub("hf_...", _without_token(one_line(error)))[:300] or type(error).__name__
        mend = f"`hf auth login`, then `hf upload {name} {folder}`"
        raise UserError(f"--push {name}: expected the Hub to take the folder, got: {came}; {mend}") from None
    return str(address)


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "hf_...") if token else text

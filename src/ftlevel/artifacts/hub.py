"""What was trained, on the Hugging Face Hub: checked before the run, uploaded after its proof.

The token is the one of `hf auth login` or of HF_TOKEN, which huggingface_hub reads by itself; it is
never written, and never an argument.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlevel.errors import ConfigError, RunError


def find_repository(name: str) -> str:
    """Return the whole name of the repository `name`, which the user may write to.

    Raises:
        ConfigError: it is no name, nobody is logged in, or the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    flag = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
        user = HfApi().whoami()
    except HFValidationError as error:
        raise ConfigError(f"{flag} is no name of a repository: {error}") from None
    except LocalTokenNotFoundError:
        raise ConfigError(f"{flag}: nobody is logged in. hf auth login, or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConfigError(f"{flag}: the Hub does not know the token. hf auth login.") from None
        raise ConfigError(f"{flag}: the Hub answers {_first_line(error)}. Try later.") from None
    # Its base is that of the HTTP library below, which changed its name between releases.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        raise ConfigError(
            f"{flag}: the Hub does not answer ({_first_line(error)}). Nothing was trained. Drop "
            "it, and upload the run afterwards with hf upload."
        ) from None
    return _with_owner(name, user, flag)


def _with_owner(name: str, user: dict[str, Any], flag: str) -> str:
    """Return `name` with its owner: the user, or an organization of theirs."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ConfigError(f"{flag}: the token may only read. Make one that writes: hf auth login.")
    owner, slash, _ = name.partition("/")
    if not slash:
        return f"{user['name']}/{name}"
    owners = [user["name"], *(org["name"] for org in user.get("orgs") or [])]
    if owner not in owners:
        raise ConfigError(
            f"{flag}: {user['name']} cannot write to {owner}. Owners here: {', '.join(owners)}."
        )
    return name


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload `folder`, card and all, and return where it is.

    Args:
        folder: what was saved.
        name: whole, as `find_repository` gave it.
        private: whether a repository that is made is hidden from others.

    Raises:
        RunError: the Hub refused it; what is on disk is whole.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload by ftlevel"
        )
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        raise RunError(
            f"--push-to-hub {name}: the upload failed ({_first_line(error)}). The run is whole in "
            f"{folder.parent}. Upload it: hf upload {name} {folder}"
        ) from None
    return str(made)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")

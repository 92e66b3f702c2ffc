"""Check access to the Hugging Face Hub before the work starts, and upload the verified result.

huggingface_hub reads the token (`hf auth login` or HF_TOKEN); ftlevel must not store or pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.config.output import HubSection
from ftlevel.errors import ConfigError, RunError


def get_repo_id(name: str) -> str:
    """Returns the full repository id OWNER/NAME; ConfigError if the user cannot write to it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there

    flag = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
        user = HfApi().whoami()
    except HFValidationError as error:
        raise ConfigError(f"{flag} is not a valid repository name: {error}") from None
    except LocalTokenNotFoundError:
        raise ConfigError(f"{flag}: not logged in. Run hf auth login, or set HF_TOKEN.") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConfigError(f"{flag}: the Hub rejects the token. Run hf auth login.") from None
        raise ConfigError(f"{flag}: the Hub reports {_first_line(error)}. Try later.") from None
    # The base class comes from the HTTP library, which differs between huggingface_hub releases.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        raise ConfigError(
            f"{flag}: the Hub is not reachable ({_first_line(error)}). Nothing was done. Drop "
            f"the flag and upload the result later with hf upload."
        ) from None
    return _add_namespace(name, user, flag)


def _add_namespace(name: str, user: dict[str, Any], flag: str) -> str:
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ConfigError(
            f"{flag}: the token is read-only. Log in with a write token: hf auth login."
        )
    owner, slash, _ = name.partition("/")
    if not slash:
        return f"{user['name']}/{name}"
    owners = [user["name"], *(org["name"] for org in user.get("orgs") or [])]
    if owner not in owners:
        raise ConfigError(
            f"{flag}: {user['name']} cannot write to {owner}. Owners here: {', '.join(owners)}."
        )
    return name


@dataclass(frozen=True)
class Upload:
    """Planned upload to Hub repository `name` (None: no upload), created as `private` if new."""

    name: str | None
    private: bool

    def send(self, paths: Sequence[Path], summary: dict[str, Any]) -> None:
        """Upload `paths` and store the URL as `summary["hub"]`; RunError if this fails."""
        if self.name is None:
            return
        is_dir = len(paths) == 1 and paths[0].is_dir()
        folder = paths[0] if is_dir else paths[0].parent
        files = [] if is_dir else [path.name for path in paths]
        summary["hub"] = push(folder, self.name, private=self.private, files=files)


def plan_upload(config: HubSection) -> Upload:
    """Returns the upload that `config` requests; raises ConfigError like `get_repo_id`."""
    name = config.push_to_hub
    return Upload(None if name is None else get_repo_id(name), config.hub_private)


def push(folder: Path, name: str, *, private: bool, files: Sequence[str] = ()) -> str:
    """Upload `folder`, or only `files` in it; return the URL. Raises RunError if this fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    include = "".join(f" --include {file}" for file in files)
    try:
        repo_url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_url.repo_id,
            folder_path=folder,
            commit_message="Upload by ftlevel",
            allow_patterns=list(files) or None,
        )
    except (OSError, *HfHubHTTPError.__bases__) as error:  # type: ignore[misc]
        raise RunError(
            f"--push-to-hub {name}: the upload failed ({_first_line(error)}). The result is "
            f"complete on this disk. Upload it with: hf upload {name} {folder}{include}"
        ) from None
    return str(repo_url)


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of `error`; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _first_line(error: BaseException) -> str:
    return first_line(error).rstrip(".")

"""x."""


def list_targets(model: str) -> None:
    """X."""

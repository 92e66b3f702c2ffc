"""x."""
def list_targets(model: str) -> None:
    """x."""

"""x."""
def generate(model: str) -> None:
    """x."""

"""The `ftlevel` program: collects the commands and turns errors into lines and exit codes."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    raise SystemExit("skeleton")

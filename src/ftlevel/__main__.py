"""Entry point of `ftlevel` and of `python -m ftlevel`, for launchers such as torchrun."""

import sys


def main() -> None:
    """Import and run the command line; Ctrl-C exits with code 130 even during imports."""
    try:
        from ftlevel.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("ftlevel: interrupted; nothing was saved.\n")
        raise SystemExit(130) from None
    finally:
        # CPython remembers a KeyboardInterrupt raised inside exec(), as in dataclasses, and would
        # end `python -m` by a signal although it was caught. Another exec() clears it.
        exec("")


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the current directory, whose modules may be a stranger's
    main()

"""The program `ftlevel`, also as `python -m ftlevel`, for launchers such as torchrun."""

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C ends it in a line from the first moment."""
    try:
        from ftlevel.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("ftlevel: interrupted; nothing was kept.\n")
        raise SystemExit(130) from None
    finally:
        # An interrupt that passed an exec() of text, as dataclasses do, is remembered by CPython,
        # which ends `python -m` by a signal for it though it was caught. The next exec() forgets.
        exec("")


if __name__ == "__main__":
    main()

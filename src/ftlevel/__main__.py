"""`python -m ftlevel`, for launchers such as torchrun."""

from ftlevel.cli.app import main

if __name__ == "__main__":
    main()

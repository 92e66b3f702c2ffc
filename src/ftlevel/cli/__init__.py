"""The command line, one module per command: parses flags, calls the engine, shows the results."""

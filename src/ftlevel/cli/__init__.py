"""The command line: one file a command. Parses flags, calls the engine, shows what it says."""

"""Commands, one module each. They do not print, parse flags or import the CLI."""

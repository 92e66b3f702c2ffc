"""Commands, one module each. They do not print or parse flags.

May import every package below them, not the CLI.
"""

"""What is typed: other names and words become ours, completion, help, a line for a mistake.

It may import the configuration and Typer. It reads no model and no data.
"""

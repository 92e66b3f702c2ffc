"""One verb a file, each reading top to bottom: what a command does with its configuration.

May import every room below it. It does not print, parse flags or hold what two verbs share: that
lies in the room of its own work.
"""

"""Serving libraries asked in a process of their own, by scripts that import nothing of ftlevel.

Each script reads what is asked from the JSON file named first, and writes the answers to the one
named second: the environment that it runs in need have no more than the library.
"""

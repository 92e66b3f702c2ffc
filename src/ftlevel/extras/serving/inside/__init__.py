"""Run serving libraries in separate processes, with scripts that must not import ftlevel.

A script reads its input from the first JSON file and writes its outputs to the second, so that its
environment needs only the library.
"""

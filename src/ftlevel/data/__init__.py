"""Rows arrive here as a user has them and leave encoded: sources, formats, encoding, gate, prepare.

May import models' kinds, artifacts and what is below; never a task (it comes in as an argument),
methods, weights or anything above. The rooms inside are in the order in which a row goes through.
"""

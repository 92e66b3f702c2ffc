"""Encode examples as token ids and labels, limit their length, store and collate them.

May import `formats` and `sources`, but no task.
"""

"""Preference training and reward models.

`formats` has the column layouts, `rows` encodes examples, `objective` has the losses, and `task`
defines the two tasks.
"""

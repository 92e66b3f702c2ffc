"""Preference training and reward models.

`formats` reads rows, `rows` encodes them, `losses` has the formulas, `objective` applies them to a
batch, and `policy` and `reward` define the two tasks.
"""

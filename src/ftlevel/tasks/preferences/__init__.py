"""Preference training and reward models.

`formats` reads rows, `rows` encodes them, `objective` has the losses, and `policy` and `reward`
define the two tasks.
"""

"""Judged answers: pairs of which one is preferred, or answers that are good or bad.

`formats` reads the rows, `rows` is what becomes of them, `losses` has the formulas, `objective` and
`meter` apply them to a batch, and `policy` and `reward` are the two tasks.
"""

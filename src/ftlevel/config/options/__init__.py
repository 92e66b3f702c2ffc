"""Fields that sections share, and what may be set of optimizers, of writing and of the output.

Imports of `config` only the section and the errors.
"""

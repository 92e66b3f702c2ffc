"""Distillation: a teacher's predictions as one more target of the tasks that write text.

`objective` is the loss, and what is kept of a teacher; `rows` are rows that know it.
"""

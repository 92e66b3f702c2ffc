"""How far two models are apart that are asked the same: rows of a task, and windows of a text.

They are never in memory together: what the first one said is kept. `on_rows` and `on_text` ask one
model, `compare` holds two answers beside one another, `pair` finds two models that can be asked
the same. May import what evaluation may; changes no model.
"""

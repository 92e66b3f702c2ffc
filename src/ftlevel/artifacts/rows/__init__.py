"""Files of rows that a command writes: CSV, TSV, JSON Lines and Parquet, by the suffix of the name.

Rows are appended to a file of the same name with `.partial` behind it, which becomes the named one
at the end: it is absent or whole, and what a process that was stopped had written can be gone on
with. Numbers, dates and lists of a table's cells are written as text that says the same.
"""

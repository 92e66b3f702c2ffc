"""Readers: one class per file format, which yields chunks of rows with lines and a cursor.

Readers do not convert, fill in or guess values; an invalid file raises `InputError` with
`path:line`. `files.READERS` registers the formats. This package must not import `splits` or
`hub`.
"""

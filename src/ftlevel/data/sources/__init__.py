"""Where rows lie and how they are read: files, the Hub, built-in sets, as tables and as streams.

May import no other room of data. It does not know what a column means.
"""

"""Where rows lie and how they are read: files, the Hub, built-in sets, as tables and as streams.

The order of the work: `splits` and `stream_sources` find what a name means, `readers` and `hub`
turn it into chunks of rows, a `table` is a stream that was collected, `uniform` finds the rows that
differ from most. May import no other room of data. It does not know what a column means.
"""

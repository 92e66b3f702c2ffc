"""Kit for a GPU machine without a network: its files, tests and measurements.

`make gpu-kit` packs it (`pack.py`); on the machine `run.py` installs what was carried and starts
`prove.py` or `measure.py`. It downloads nothing there.
"""

"""Kit for a GPU machine without a network: files, tests and measurements.

`make gpu-kit` packs it (`pack.py`); on the machine, `run.py` installs its wheels and starts
`prove.py` or `measure.py`. Nothing is downloaded there.
"""

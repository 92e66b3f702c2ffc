"""The kit for a borrowed GPU: what is carried there, and what is proved and measured with it.

`make gpu-kit` packs it (`pack.py`); on the machine `run.py` installs what was carried and starts
`prove.py` or `measure.py`. It downloads nothing there.
"""

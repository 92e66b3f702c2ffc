"""The gate: what is wrong with encoded rows, found before a model sees them.

A check returns the rows in which it found something; `findings` turns that into data by the policy
of the configuration. No check changes a row, and none takes more than linear time.
"""

from ftlevel.data.gate.findings import Finding, explain_stop, judge
from ftlevel.data.gate.flat import Flat

__all__ = ["Finding", "Flat", "explain_stop", "judge"]

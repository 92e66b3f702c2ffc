"""One page about one run or several: read what they wrote, draw curves, fill a template.

Knows nothing of how runs are made: it reads summary.json, metrics.jsonl and rows of answers.
"""

"""Internals of other libraries that ftlevel uses.

Private names of transformers, torch, accelerate, bitsandbytes and datasets are used only in this
package; those of PEFT are in `methods/upstream.py`. Each has an entry in tests/upstream_facts.yaml,
with its file and purpose, and a test in tests/unit/models/test_upstream.py.
"""

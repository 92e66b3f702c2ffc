"""Bottleneck adapters in AdapterHub's file format: loading and export."""

"""Reinforcement learning from checkable rewards: configuration, task, sampling, step and checks."""

from __future__ import annotations

from ftlevel.extensions import Extension

EXTENSION = Extension()

"""Preference training and reward models."""

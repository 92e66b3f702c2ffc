"""Render an HTML report on runs from their files; must not import anything that creates runs."""

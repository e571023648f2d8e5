"""Guidance rules in their published form, each a function of one `Step` or of a whole run."""

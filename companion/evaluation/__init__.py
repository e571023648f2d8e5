"""Sampling runs, metrics, tables, comparisons and studies; needs the extra `tables`."""

from companion.extras import need

need("tables", __name__)

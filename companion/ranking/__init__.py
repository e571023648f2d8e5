"""The ranking: any guidance rule against the exact optimum (docs/ranking.md)."""

"""The weights that others made: where they are, whether they are right, fetched and merged."""

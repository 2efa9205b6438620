"""The weights that others made: where they are, whether they are right, fetched and merged."""

import model  # noqa: F401  (quiets libraries, before they are loaded)

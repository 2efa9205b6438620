"""Shared utilities without dependencies on other packages: errors, files, CLI, processes."""

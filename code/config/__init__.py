"""Configuration: the typed schema, its loader and the YAML files."""

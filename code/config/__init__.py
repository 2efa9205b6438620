"""Configuration: the typed schema, the YAML files, and the errors that users see."""

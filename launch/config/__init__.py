"""The configuration: schema, YAML files, recipes."""

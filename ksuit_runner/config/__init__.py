"""From YAML to objects: composes a config, checks it, and builds the objects that it describes."""

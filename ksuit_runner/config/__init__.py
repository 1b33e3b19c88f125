"""From YAML to objects: composing a config, what stands where in it, and building what it names."""

"""The recipes that come with the package, one complete YAML file each."""

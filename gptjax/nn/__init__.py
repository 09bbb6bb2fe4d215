"""The one transformer: configuration, modules, caches and costs."""

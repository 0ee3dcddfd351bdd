"""The model that is traced: from a config to modules without weights, as it was published."""

"""The model that is traced: from a config to modules without weights, as published where transformers departs from it."""

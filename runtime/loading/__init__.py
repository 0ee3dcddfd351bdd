"""From a bundle's path to a model on a device."""

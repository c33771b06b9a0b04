"""From a dataset on disk to aligned token pairs."""

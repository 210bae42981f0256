"""Mixed-supervision segmentation networks: data, training, evaluation. Knows nothing of the search."""

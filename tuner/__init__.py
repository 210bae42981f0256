"""Distributed hyperparameter search for surface-defect segmentation."""

"""Runs of a recipe on real data, with several seeds and networks: segmentation, detection. No part of the package."""

"""Object detection and instance segmentation: boxes, classes, scores, and masks of single things."""

"""What segmentation and detection have in common: images of any size, with more to them than a class."""

"""What segmentation and detection have in common: networks with parts of their own on the maps of any backbone."""

"""Numbers of image evaluation: distances between sets of features, intervals, copies of training images, CLIP score, text in images."""

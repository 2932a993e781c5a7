"""Headers of image files, checked before a decoder sees them."""

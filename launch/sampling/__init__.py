"""Draw images from a trained model."""

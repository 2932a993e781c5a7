"""Sample images from a trained model."""

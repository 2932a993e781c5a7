"""Lists of prompts with their settings, and the images that they ask for."""

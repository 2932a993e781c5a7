"""`tim eval`: quality of a model by number of steps, size and aspect ratio, against the images of a corpus."""

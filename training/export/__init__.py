"""From a trained network to the files of a bundle."""

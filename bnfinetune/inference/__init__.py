"""Networks in use: from images to labels and probabilities, whatever format a network was written in."""
